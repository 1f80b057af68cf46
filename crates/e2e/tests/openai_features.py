"""What a service with an extraction policy and a model with tools offers, by the official `openai` package.

    python openai_features.py BASE_URL MODEL

Prints one JSON object per check and exits non-zero at the first one that fails.
"""

import json
import sys

import openai

base_url, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base_url, api_key="unused", max_retries=0, timeout=120)
# A model of noise would fill its answers with white space.
NO_BLANKS = {"9": -100, "10": -100, "13": -100, "32": -100}


def check(name, condition, found=None):
    print(json.dumps({"check": name, "ok": bool(condition), "found": found}), flush=True)
    if not condition:
        sys.exit(1)


def refused(name, param, code, call):
    try:
        call()
    except openai.BadRequestError as error:
        body = error.body or {}
        found = {"param": body.get("param"), "code": body.get("code")}
        check(name, found == {"param": param, "code": code}, found)
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


def until(finish, **overrides):
    """The first answer, over some seeds, that ends so."""
    for seed in range(40):
        choice = chat(seed=seed, temperature=1, max_tokens=150, **overrides).choices[0]
        if choice.finish_reason == finish:
            return choice, seed
    check(f"an answer ends with {finish}", False)


entries = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
check("every token has its logprob", len(entries) == 8, len(entries))
check("each has its alternatives", all(len(entry.top_logprobs) == 3 for entry in entries))
check("the likeliest was chosen", all(e.logprob == e.top_logprobs[0].logprob for e in entries))
values = [top.logprob for entry in entries for top in entry.top_logprobs]
check("values are rounded", all(value <= 0 and round(value, 1) == value for value in values), values[:3])
streamed = [
    entry
    for chunk in chat(logprobs=True, top_logprobs=3, stream=True)
    for choice in chunk.choices
    if choice.logprobs
    for entry in choice.logprobs.content
]
check("a stream has the same", streamed == entries)
text = client.completions.create(model=model, prompt="ab", max_tokens=4, temperature=0, logprobs=2)
check("completions have theirs", len(text.choices[0].logprobs.token_logprobs) == 4)
refused("more are refused", "top_logprobs", "extraction_policy", lambda: chat(logprobs=True, top_logprobs=4))
refused("not with biases", "logit_bias", "extraction_policy", lambda: chat(logprobs=True, logit_bias={"5": 1}))
check("a bias steers", chat(logit_bias={str(ord("Q")): 100}).choices[0].message.content == "Q" * 8)

choice, _ = until("stop", response_format={"type": "json_object"}, logit_bias=NO_BLANKS)
check("JSON mode gives an object", isinstance(json.loads(choice.message.content), dict))
schema = {
    "type": "object",
    "properties": {"mood": {"type": "string", "enum": ["calm", "wild"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}
choice, _ = until(
    "stop",
    response_format={"type": "json_schema", "json_schema": {"name": "mood", "schema": schema, "strict": True}},
    logit_bias=NO_BLANKS,
)
mood = json.loads(choice.message.content)
check("a schema is followed", set(mood) == {"mood", "sure"} and mood["mood"] in ("calm", "wild"), mood)

tools = [{"type": "function", "function": {"name": "note", "strict": True, "parameters": schema}}]
named = {"type": "function", "function": {"name": "note"}}
choice, seed = until("tool_calls", tools=tools, tool_choice=named, logit_bias=NO_BLANKS)
call = choice.message.tool_calls[0]
check("a call is made", call.function.name == "note" and choice.message.content is None, call.function.name)
check("its arguments follow the schema", set(json.loads(call.function.arguments)) == {"mood", "sure"})
deltas = [
    delta
    for chunk in chat(
        seed=seed, temperature=1, max_tokens=150, tools=tools, tool_choice=named, logit_bias=NO_BLANKS, stream=True
    )
    for part in chunk.choices
    for delta in part.delta.tool_calls or []
]
check("a streamed call is the same", [d.function.arguments for d in deltas] == [call.function.arguments])
refused("strict needs one function", "tools[0].function.strict", "unsupported_parameter", lambda: chat(tools=tools))
answer = chat(
    tools=tools,
    tool_choice="none",
    messages=[
        {"role": "user", "content": "How are you?"},
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "noted"},
    ],
)
check("a result goes back", isinstance(answer.choices[0].message.content, str))
check("the seed is reported", chat(seed=7).model_dump()["seed"] == 7)
