"""What a service with an extraction policy and a model with tools offers, by the official `openai` package.

    python openai_features.py BASE_URL MODEL CALL_TOKEN END_TOKEN

The two tokens begin a call and end an answer.

Prints one JSON object per check and exits non-zero at the first one that fails.
"""

import enum
import json
import sys
from typing import Literal, Optional

import openai
import pydantic

base_url, model, call_token, end_token = sys.argv[1:5]
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

class Unit(enum.Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Place(pydantic.BaseModel):
    indoors: bool
    floor: Optional[Literal[1, 2, 3]]


class Measure(pydantic.BaseModel):
    """Measures the temperature."""

    unit: Unit = pydantic.Field(description="of the answer")
    other: Optional[Unit] = None
    place: Place


class Off(pydantic.BaseModel):
    now: bool


declared = [openai.pydantic_function_tool(Measure), openai.pydantic_function_tool(Off)]
check("the package declares strictly", all(tool["function"]["strict"] for tool in declared))
# Noise would rather say something else than call, or end.
willing = {**NO_BLANKS, call_token: 9, end_token: 9}
parsed, said = [], 0
for seed in range(16):
    try:
        free = client.chat.completions.parse(
            model=model,
            messages=[{"role": "user", "content": "How warm is it?"}],
            tools=declared,
            seed=seed,
            temperature=1,
            max_tokens=1000,
            logit_bias=willing,
        ).choices[0]
    except openai.LengthFinishReasonError:
        continue
    parsed += [made.function.parsed_arguments for made in free.message.tool_calls or []]
    said += not free.message.tool_calls
check("the model may call, and need not", len(parsed) > 4 and said > 1, [len(parsed), said])
check("every call is what was declared", all(isinstance(call, (Measure, Off)) for call in parsed))
check("both are called", {type(call) for call in parsed} == {Measure, Off})
unenforceable = openai.pydantic_function_tool(pydantic.create_model("Bad", n=(int, pydantic.Field(ge=1))))
refused(
    "a bound is refused by its place",
    "tools[1].function.parameters",
    "invalid_value",
    lambda: chat(tools=[declared[1], unenforceable]),
)
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
