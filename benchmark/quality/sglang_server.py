"""The server that a benchmark asks, by its URL."""

from typing import Dict, List

import requests


class Server:
    """A server's OpenAI-compatible API."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        info = requests.get(f"{self.url}/get_server_info", timeout=60)
        info.raise_for_status()
        self.info = info.json()

    def post(self, path: str, **body) -> Dict:
        response = requests.post(f"{self.url}{path}", json=body, timeout=3600)
        response.raise_for_status()
        return response.json()

    def tokenize(self, text: str) -> List[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return self.post("/tokenize", **body)["tokens"]

    def special_tokens(self) -> List[int]:
        """What the model's tokenizer puts before every text."""
        return self.post("/tokenize", prompt="", add_special_tokens=True)["tokens"]

    def complete(self, tokens: List[int], new_tokens: int) -> str:
        answer = self.post(
            "/v1/completions",
            model="default",
            prompt=tokens,
            max_tokens=new_tokens,
            temperature=0,
        )
        return answer["choices"][0]["text"]

    def variant(self) -> Dict:
        """The fields of a result that say what the server runs; 0 where that has no such number."""
        info = self.info
        name, heads, block, candidates = "dsa", 0, 0, 0
        if info.get("enable_misa"):
            name = info.get("misa_eval_selection") or "misa"
            heads, block = info["misa_active_heads"], info["misa_block_size"]
            candidates = info["misa_rerank_candidates"]
            if name == "misa" and candidates:
                name = "misa-hierarchical"
            elif name == "hisa":
                heads, block = 0, 128
            elif name != "misa":
                block = 0
        return {
            "variant": name,
            "active_heads": heads,
            "block_size": block,
            "rerank_candidates": candidates,
        }
