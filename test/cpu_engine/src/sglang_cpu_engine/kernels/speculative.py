# SPDX-License-Identifier: Apache-2.0
"""What SGLang's speculative decoding calls on a CPU, for chains of drafts: those of its sgl_kernel under their names there,
and the lengths of the rows of a verify, which is a Triton kernel.
"""

import torch


def build_tree_kernel_efficient_cpu(
    _parents: torch.Tensor,
    _scores: torch.Tensor,
    seq_lens: torch.Tensor,
    _mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    _retrieve_next_sibling: torch.Tensor,
    topk: int,
    _depth: int,
    draft_tokens: int,
    _mask_mode: int,
) -> None:
    """Fills positions int64 [batch * draft_tokens], and the number of each token, int64 [batch, draft_tokens], in the batch
    and, of the next one, in its chain. Nobody reads the mask: the attention takes the tokens that the indexer selects.
    """
    assert topk == 1, "a chain"
    place = torch.arange(draft_tokens)
    positions.copy_((seq_lens[:, None] + place).flatten())
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token[:, :-1] = place[1:]


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """A draft is accepted if all drafts before it are, and the model predicts it.

    candidates, target_predict: [batch, draft_tokens]; fills predicts int32 [batch * draft_tokens], accept_index int32
    [batch, draft_tokens], -1 behind the accepted ones, and accept_token_num int32 [batch], the number of right drafts.
    """
    right = candidates[:, 1:] == target_predict[:, :-1]
    accept_token_num.copy_(right.int().cumprod(1).sum(1))
    accepted = torch.arange(candidates.shape[1]) <= accept_token_num[:, None]
    accept_index.copy_(torch.where(accepted, retrive_index, -1))
    predicts.copy_(torch.where(accepted, target_predict, 0).flatten())


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    stride: int,
) -> None:
    """Each request's last accepted token. accept_tokens: [batch, stride]; accept_lens: [batch]; fills int32 [batch]."""
    last = accept_tokens.view(-1, stride).gather(1, accept_lens[:, None].long() - 1)
    bonus_tokens.copy_(last[:, 0])


def _spans(
    requests: torch.Tensor, start: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of req_to_token for the tokens start to end - 1 of each request. requests, start, end: [batch]."""
    counts = (end - start).long()
    first = start.long() - (counts.cumsum(0) - counts)
    columns = torch.arange(int(counts.sum())) + first.repeat_interleave(counts)
    return requests.long().repeat_interleave(counts), columns


def assign_req_to_token_pool_cpu(
    requests: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    slots: torch.Tensor,
    _pool_len: int,
) -> None:
    """Writes the slots of the tokens start to end - 1 of each request. req_to_token: int32 [requests, context]."""
    req_to_token[_spans(requests, start, end)] = slots.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    requests: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    slots: torch.Tensor,
    _pool_len: int,
) -> None:
    """Reads them."""
    slots.copy_(req_to_token[_spans(requests, start, end)])


def assign_draft_cache_locs_contiguous_cpu(
    requests: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    slots: torch.Tensor,
    _pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Reads those of the next topk * num_steps tokens."""
    end = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(requests, req_to_token, seq_lens, end, slots, 0)


def seqlens_expand(
    extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, total: int, _max_rows: int
) -> torch.Tensor:
    """The tokens that each row sees, not below 0, where the last extend_seq_lens tokens of sequences are rows -> int32 [total]."""
    _, ends = _spans(seq_lens, seq_lens - extend_seq_lens + 1, seq_lens + 1)
    assert len(ends) == total
    return ends.clamp(min=0).int()
