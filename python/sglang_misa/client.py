"""What is asked of a running SGLang server, by its URL."""

import functools
import json
import time
from typing import Dict, Iterator, List, Optional

import requests

# A request may wait for long prompts of others: this ends one that hangs.
REQUEST_SECONDS = 3600


class Client:
    """A server's own API and its OpenAI-compatible one.

    What a method gets from the server raises `requests.HTTPError` where the server refuses it.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def get(self, path: str) -> requests.Response:
        response = requests.get(self.url + path, timeout=REQUEST_SECONDS)
        response.raise_for_status()
        return response

    def post(self, path: str, **body) -> requests.Response:
        response = requests.post(self.url + path, json=body, timeout=REQUEST_SECONDS)
        response.raise_for_status()
        return response

    @functools.cached_property
    def info(self) -> Dict:
        """The server's arguments and what it says of itself, as it was when first asked for."""
        return self.get("/get_server_info").json()

    def variant(self) -> Dict:
        """The fields of a result that say what the server runs; 0 where that has no such number, "" for no router."""
        info = self.info
        name, heads, block, candidates, router = "dsa", 0, 0, 0, ""
        if info.get("enable_misa"):
            misa = info["misa"]
            name = info.get("misa_eval_selection") or "misa"
            heads, candidates = misa["active_heads"], misa["rerank_candidates"]
            if name == "misa":
                block, router = misa["block_size"] or 0, misa["router"]
                if candidates:
                    name = "misa-hierarchical"
            elif name == "hisa":
                heads, block = 0, 128
        return {
            "variant": name,
            "active_heads": heads,
            "block_size": block,
            "rerank_candidates": candidates,
            "router": router,
        }

    def metrics(self) -> Dict[str, float]:
        """The server's metrics without their labels."""
        from prometheus_client.parser import text_string_to_metric_families

        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
        }

    def tokenize(self, text: str) -> List[int]:
        """The text's token ids, without special ones."""
        answer = self.post("/tokenize", prompt=text, add_special_tokens=False)
        return answer.json()["tokens"]

    def special_tokens(self) -> List[int]:
        """What the model's tokenizer puts before every text."""
        answer = self.post("/tokenize", prompt="", add_special_tokens=True)
        return answer.json()["tokens"]

    def generate(
        self,
        tokens: List[int],
        new_tokens: int = 4,
        rid: Optional[str] = None,
        *,
        ignore_eos: bool = True,
        **body,
    ) -> Dict:
        """Greedy generation of exactly `new_tokens` from token ids; returns SGLang's answer.

        For requests that ignore the end SGLang 0.5.23 keeps room from the start; without `ignore_eos` they may outgrow the cache.
        """
        sampling_params = {"temperature": 0, "max_new_tokens": new_tokens}
        if ignore_eos:
            sampling_params["ignore_eos"] = True
        else:
            sampling_params["min_new_tokens"] = new_tokens
        return self.post(
            "/generate",
            input_ids=tokens,
            rid=rid,
            sampling_params=sampling_params,
            **body,
        ).json()

    def complete(self, tokens: List[int], new_tokens: int) -> str:
        """Greedy completion of token ids by at most `new_tokens`, as text."""
        answer = self.post(
            "/v1/completions",
            model="default",
            prompt=tokens,
            max_tokens=new_tokens,
            temperature=0,
        )
        return answer.json()["choices"][0]["text"]

    def stream(self, prompt: str, new_tokens: int) -> Iterator[Dict]:
        """The events of a greedy completion of a text, each as it comes; the last one has the usage."""
        body = {
            "model": "default",
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with requests.post(
            f"{self.url}/v1/completions",
            json=body,
            stream=True,
            timeout=REQUEST_SECONDS,
        ) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    yield json.loads(line[len(b"data: ") :])

    def set_chunk(self, tokens: int) -> None:
        """From now on prompts are prefilled in chunks of so many tokens; the CPU engine alone can change that.

        Raises:
            ValueError: the server does not.
        """
        values = {"chunked_prefill_size": tokens}
        answer = self.post("/set_internal_state", server_args=values)
        if not all(answer.json()):
            raise ValueError(f"{self.url} does not change its chunked_prefill_size")

    def flush_cache(self) -> None:
        """Empty the radix cache, once nothing is running.

        Raises:
            TimeoutError: the server does not become idle.
        """
        deadline = time.monotonic() + REQUEST_SECONDS
        # Refused while a request is still being cleaned up.
        while not requests.post(f"{self.url}/flush_cache", timeout=REQUEST_SECONDS).ok:
            if time.monotonic() > deadline:
                raise TimeoutError("the server does not become idle")
            time.sleep(0.1)
