"""What every record of the indexer must satisfy: bit for bit on a CPU, up to ties on a GPU."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, List, Set

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.testing import judge
from sglang.srt.layers.misa.testing.inputs import Inputs

# Rows of a record whose shared head is compared with the reference's, which takes long for each; the selection of all is.
SHARED_ROWS = 16


def check_record(
    record: Dict, config: MisaConfig, topk: int, *, exact: bool = True, **forced
) -> None:
    """Page means, heads, the shared head and positions are the reference's on the recorded inputs.

    Page means always are bit for bit. Without `exact`, the heads and the shared head may be any that the estimates allow up to
    rounding, and the positions any that the scores by the recorded heads allow. What SGLang's own indexer selected may be in
    any order, and equal scores may be broken in any way.

    Args:
        record: as `capture.Recorder` writes it.
        forced: arguments of `reference.force`.
    """
    inputs = Inputs(*(record[name] for name in Inputs._fields))
    if record["decode"]:
        left = config.decode == "dsa" and len(inputs.q) == 1
        assert (record["router"] is None) == left
    elif record["router"] is None:
        assert (inputs.lengths <= config.min_context).all()
    if record["router"] is None:
        check_dsa(record["positions"], inputs, topk, exact, forced)
        return
    assert record["router"] == config.router
    heads, means = record["heads"], None
    if config.pools_keys:
        means = reference.page_means(inputs.k, inputs.k_scale)
        cached = record["page_means"][: len(means)]
        assert torch.equal(cached.view(torch.int16), means.view(torch.int16))
    else:
        assert record["page_means"] is None
    assert (record["shared_q"] is None) == (heads is None or config.pools_keys)
    if heads is None:
        short = inputs.lengths <= config.min_context
        assert config.active_heads == inputs.q.shape[1] or bool(short.all())
    elif exact:
        check_same_routing(record, inputs, means, config)
    elif config.pools_keys:
        assert heads.shape[1] == config.active_heads
        judge.check_routing(heads, inputs, means, config.block_size)
    else:
        assert heads.shape[1] == config.active_heads - 1
        routed = heads, record["shared_q"], record["shared_scale"]
        judge.check_sampled_routing(routed, inputs)
    if exact:
        expected = selected_by(record, inputs, config, topk, forced)
        assert torch.equal(record["positions"].long(), expected)
        return
    shared = record["shared_q"], record["shared_scale"]
    judge.check_selection(
        record["positions"],
        inputs,
        heads,
        topk,
        shared=None if shared[0] is None else judge.SharedHead(*shared),
        rerank_candidates=0 if heads is None else config.rerank_candidates,
        **forced,
    )


def check_dsa(positions, inputs: Inputs, topk: int, exact: bool, forced: Dict) -> None:
    """The positions, in any order, are those of DSA, or others of equal score."""
    positions = positions.long()
    there = positions >= 0
    end = len(inputs.k)
    ordered = positions.masked_fill(~there, end).sort(1).values
    ordered = ordered.masked_fill(ordered == end, -1)
    if not exact:
        judge.check_selection(ordered, inputs, None, topk, ties=False, **forced)
        return
    assert (ordered.diff(dim=1)[ordered[:, 1:] >= 0] > 0).all(), "a position twice"
    assert (ordered < inputs.lengths[:, None]).all()
    scores = reference.token_scores(*inputs[:4])
    scores = reference.force(scores, inputs.lengths, **forced)
    expected = reference.dsa(*inputs, topk, **forced)
    assert torch.equal(ordered >= 0, expected >= 0)
    chosen, wanted = (
        scores.gather(1, x.clamp(min=0)).masked_fill(x < 0, 0).sort(1).values
        for x in (ordered, expected)
    )
    assert torch.equal(chosen, wanted)


def check_same_routing(record, inputs: Inputs, means, config: MisaConfig) -> None:
    """The heads are the reference's bit for bit, and with the sampled router the shared head too, of some of the rows."""
    rows = len(inputs.q) if config.pools_keys else SHARED_ROWS
    some = torch.linspace(0, len(inputs.q) - 1, rows).long().unique()
    q, weights, lengths = inputs.q[some], inputs.weights[some], inputs.lengths[some]
    h = config.active_heads
    if config.pools_keys:
        heads = reference.route(q, weights, means, lengths, h, config.block_size)
    else:
        heads, shared_q, shared_scale = reference.route_sampled(
            q, weights, inputs.k, inputs.k_scale, lengths, h
        )
        assert torch.equal(record["shared_q"][some].float(), shared_q.float())
        assert torch.equal(record["shared_scale"][some], shared_scale)
    assert torch.equal(record["heads"][some].long(), heads)


def selected_by(record, inputs: Inputs, config, topk, forced) -> torch.Tensor:
    """The reference's selection by the record's heads and its shared head."""
    if record["heads"] is None:
        return reference.dsa(*inputs, topk, **forced)
    scored = reference.of_heads(inputs.q, inputs.weights, record["heads"].long())
    shared = record["shared_q"], record["shared_scale"]
    scores = reference.token_scores(*scored, inputs.k, inputs.k_scale, *shared)
    m = config.rerank_candidates
    return reference.best_of(scores, *inputs, topk, m, **forced)


def check_speculation(server, prompts: List[List[int]], new_tokens: int) -> List[Dict]:
    """Generates with drafts, some of which are right: rejected ones leave nothing behind. Returns what was recorded.

    A pass over a whole text predicts its tokens; and the keys in the cache are those of the text, as one sees in the first
    layer, where they are functions of the tokens.
    """

    def first_layer_keys(whole):
        server.forget()
        answer = server.generate(whole, 1)
        (record,) = (
            r
            for r in server.records()
            if (r["layer_id"], r["draft"], r["decode"]) == (0, False, False)
            and len(r["k"]) == len(whole)
        )
        return answer["meta_info"]["cached_tokens"], record["k"].float()

    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda x: server.generate(x, new_tokens), prompts))
    drafted = server.records()
    texts = [x + answer["output_ids"] for x, answer in zip(prompts, answers)]
    cached = [first_layer_keys(whole) for whole in texts]
    server.reset()
    right = 0
    for prompt, whole, answer, (hit, keys) in zip(prompts, texts, answers, cached):
        assert hit == (len(whole) - 1) // 64 * 64 > len(prompt)
        none, cold = first_layer_keys(whole)
        assert none == 0
        # A key of another token differs in most places, one that was rounded in another batch in few.
        assert ((keys != cold).float().mean(1) < 0.2).all()
        given = server.generate(
            whole,
            1,
            return_logprob=True,
            logprob_start_len=len(prompt) - 1,
            top_logprobs_num=1,
        )
        best = [x[0][1] for x in given["meta_info"]["input_top_logprobs"][1:]]
        same = sum(x == y for x, y in zip(best, answer["output_ids"], strict=True))
        print(f"{same} of {new_tokens} tokens are those of a prompt's pass")
        assert same >= (0.9 if torch.cuda.is_available() else 1) * new_tokens
        drafts = answer["meta_info"]
        right += drafts["spec_num_correct_drafts"]
        assert drafts["spec_num_correct_drafts"] < drafts["spec_num_proposed_drafts"]
    assert right > 0, "no draft was right"
    return drafted


def check_records(records: List[Dict], config: MisaConfig, topk: int) -> None:
    assert records, "the indexer recorded nothing"
    for record in records:
        check_record(record, config, topk)


def covered(records: List[Dict]) -> Dict[int, Set[int]]:
    """The lengths of the rows recorded, by layer."""
    lengths = defaultdict(set)
    for record in records:
        lengths[record["layer_id"]].update(record["lengths"].tolist())
    return dict(lengths)


def selections(records: List[Dict], first: int, last: int) -> torch.Tensor:
    """Positions chosen by the rows that see `first` to `last` tokens -> [layers, last - first + 1, topk]."""
    layers = defaultdict(dict)
    for record in records:
        for length, row in zip(record["lengths"].tolist(), record["positions"]):
            layers[record["layer_id"]][length] = row
    return torch.stack(
        [
            torch.stack([rows[length] for length in range(first, last + 1)])
            for _, rows in sorted(layers.items())
        ]
    )


def prompt_rows(folder: Path) -> List[List[int]]:
    """The lengths of the rows of prompts that each process recorded of the first layer, ascending."""
    lengths = defaultdict(list)
    for path in folder.glob("*.pt"):
        record = torch.load(path)
        if record["layer_id"] == 0 and not record["decode"]:
            # Names begin with the process.
            lengths[path.name.split("-")[0]] += record["lengths"].tolist()
    return [sorted(x) for x in lengths.values()]
