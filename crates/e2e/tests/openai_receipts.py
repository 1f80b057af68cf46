"""Answers to the official `openai` package, each steered by one means, with what a user keeps of them.

    python openai_receipts.py BASE_URL MODEL DIRECTORY

Writes NAME.request and NAME.answer, the exact bytes of both bodies, and NAME.json, the receipt's bundle, into the directory,
and prints the names.
"""

import pathlib
import sys
import urllib.request

import openai

base_url, model, directory = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
chats = client.chat.completions.with_raw_response
texts = client.completions.with_raw_response


def keep(name, raw):
    (directory / f"{name}.request").write_bytes(raw.http_request.content)
    (directory / f"{name}.answer").write_bytes(raw.content)
    with urllib.request.urlopen(f"{base_url}/receipts/{raw.headers['casemate-receipt']}") as bundle:
        (directory / f"{name}.json").write_bytes(bundle.read())
    print(name, flush=True)


def chat(name, **steering):
    question = [{"role": "user", "content": "Is the accused guilty? canary-77c1"}]
    keep(name, chats.create(model=model, messages=question, max_tokens=8, temperature=0, **steering))


verdict = {
    "type": "object",
    "properties": {"verdict": {"const": "guilty"}},
    "required": ["verdict"],
    "additionalProperties": False,
}


def tool(name, strict):
    return {"type": "function", "function": {"name": name, "strict": strict, "parameters": verdict}}


chat("free")
chat("biased", logit_bias={str(ord("Q")): 100, "10": -2.5})
chat("json", response_format={"type": "json_object"})
chat("schema", response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": verdict}})
chat("offered", tools=[tool("a", False), tool("b", False)], parallel_tool_calls=False)
chat("called", tools=[tool("a", False), tool("b", False)], tool_choice="required")
chat("dictated", tools=[tool("a", True)], tool_choice={"type": "function", "function": {"name": "a"}})
keep("cut", texts.create(model=model, prompt="ab", max_tokens=4, stop=["x", "canary-77c1"]))
