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
        """The fields of a result that say what the server runs."""
        if not self.info.get("enable_misa"):
            return {
                "variant": "dsa",
                "active_heads": 0,
                "block_size": 0,
                "rerank_candidates": 0,
            }
        candidates = self.info["misa_rerank_candidates"]
        return {
            "variant": "misa-hierarchical" if candidates else "misa",
            "active_heads": self.info["misa_active_heads"],
            "block_size": self.info["misa_block_size"],
            "rerank_candidates": candidates,
        }
