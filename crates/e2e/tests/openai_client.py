"""Drives the proxy with the official `openai` package, as an application would.

    python openai_client.py BASE_URL MODEL

Prints one JSON object per check and exits non-zero at the first one that fails.
"""

import json
import sys
import time

import openai

base_url, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)


def check(name, condition, found=None):
    print(json.dumps({"check": name, "ok": bool(condition), "found": found}), flush=True)
    if not condition:
        sys.exit(1)


def refused(name, param, code, call, status=400):
    try:
        call()
    except openai.APIStatusError as error:
        body = error.body or {}
        found = {"status": error.status_code, "param": body.get("param"), "code": body.get("code")}
        check(name, found == {"status": status, "param": param, "code": code}, found)
    else:
        check(name, False, "accepted")


def chat(**overrides):
    arguments = {
        "model": model,
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    arguments.update(overrides)
    return client.chat.completions.create(**arguments)


models = [entry.id for entry in client.models.list()]
check("models are listed", models == [model], models)
check("a model can be retrieved", client.models.retrieve(model).id == model)

whole = chat()
check("a chat answer has the right object", whole.object == "chat.completion", whole.object)
check("a chat answer has text", isinstance(whole.choices[0].message.content, str))
check("it says why it ended", whole.choices[0].finish_reason in ("length", "stop"))
check(
    "usage adds up",
    whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    and 0 < whole.usage.completion_tokens <= 8,
    whole.usage.model_dump(),
)

pieces, usage, finish = [], None, None
for chunk in chat(stream=True, stream_options={"include_usage": True}):
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        finish = choice.finish_reason or finish
check("streamed text equals whole text", "".join(pieces) == whole.choices[0].message.content)
check("streamed end equals whole end", finish == whole.choices[0].finish_reason, finish)
check("a stream tells usage when asked", usage and usage.completion_tokens == whole.usage.completion_tokens)

several = chat(n=3, temperature=1.0, seed=7)
texts = [choice.message.content for choice in several.choices]
check("n answers come back in order", [c.index for c in several.choices] == [0, 1, 2])
again = [choice.message.content for choice in chat(n=3, temperature=1.0, seed=7).choices]
check("a seed repeats its answers", texts == again)
check("choices differ from each other", len(set(texts)) > 1, len(set(texts)))

text = client.completions.create(model=model, prompt="Once upon a time", max_tokens=12, temperature=0)
check("a completion has the right object", text.object == "text_completion", text.object)
full = text.choices[0].text
check("a completion has text", len(full) > 0)
streamed = "".join(
    chunk.choices[0].text
    for chunk in client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=12, temperature=0, stream=True
    )
    if chunk.choices
)
check("a streamed completion equals the whole", streamed == full)
two = client.completions.create(
    model=model, prompt=["Once upon a time", "Hello"], max_tokens=4, temperature=0
)
check("each prompt gets its answer", len(two.choices) == 2 and full.startswith(two.choices[0].text))

stop = full[3:5]
cut = client.completions.create(
    model=model, prompt="Once upon a time", max_tokens=12, temperature=0, stop=[stop]
)
check("text ends before a stop string", cut.choices[0].text == full[: full.index(stop)], cut.choices[0].text)
check("a stop string is a stop", cut.choices[0].finish_reason == "stop", cut.choices[0].finish_reason)

refused("logit_bias needs a policy", "logit_bias", "extraction_policy", lambda: chat(logit_bias={"5": 1}))
refused("logprobs need a policy", "logprobs", "extraction_policy", lambda: chat(logprobs=True))
refused(
    "tools are refused by name",
    "tools",
    "unsupported_parameter",
    lambda: chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
)
refused("storing is refused by name", "store", "unsupported_parameter", lambda: chat(store=True))
check("a user may be named", chat(user="u").choices[0].message.content == whole.choices[0].message.content)
refused("unknown fields are refused by name", "frobnicate", "unknown_parameter", lambda: chat(extra_body={"frobnicate": 1}))
refused("another model is refused", "model", "model_not_found", lambda: chat(model="gpt-4o"), status=404)
refused("temperature has a range", "temperature", "invalid_value", lambda: chat(temperature=3))
refused("messages have roles", "messages[0]", "invalid_value", lambda: chat(messages=[{"role": "tool", "content": ""}]))
refused(
    "a prompt beyond the context is refused",
    "messages",
    "context_length_exceeded",
    lambda: chat(messages=[{"role": "user", "content": "word " * 20000}]),
)
check("the service still answers", chat().choices[0].message.content == whole.choices[0].message.content)

started = time.monotonic()
stream = chat(stream=True, max_tokens=100000)
for number, _ in enumerate(stream):
    if number == 3:
        break
stream.close()
check("a stream can be abandoned", time.monotonic() - started < 60)
