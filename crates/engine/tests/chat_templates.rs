//! Published chat templates render the formats that their models were trained on. The expected
//! texts are written from the published descriptions of the formats, not from a run.

use std::fs;

use casemate_engine::{
    CallFormat, ChatError, ChatMessage, ChatTemplate, ControlNames, FunctionCall, ToolCall,
};
use serde_json::json;
use time::OffsetDateTime;

const REFUSAL: &str = "Conversation roles must alternate user/assistant/user/assistant/...";

fn template(family: &str, bos: &str, eos: &str) -> Option<ChatTemplate> {
    let file = casemate_testkit::data::file(format!("configs/chat_template.{family}.json"))?;
    let json = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let source = json["chat_template"].as_str().unwrap();
    let control = ControlNames::new([bos, eos].map(str::to_owned)).unwrap();
    Some(
        ChatTemplate::new(
            source.as_bytes(),
            Some(bos.into()),
            Some(eos.into()),
            control,
        )
        .unwrap(),
    )
}

fn conversation(turns: &[(&str, &str)]) -> Vec<ChatMessage> {
    turns
        .iter()
        .map(|&(role, content)| ChatMessage {
            role: role.into(),
            content: content.into(),
            ..ChatMessage::default()
        })
        .collect()
}

fn render(
    template: &ChatTemplate,
    turns: &[(&str, &str)],
    generate: bool,
) -> Result<String, ChatError> {
    let prompt = template.render(&conversation(turns), generate, OffsetDateTime::UNIX_EPOCH)?;
    Ok(prompt.text())
}

const FIVE: [(&str, &str); 4] = [
    ("system", "Be brief."),
    ("user", "  Hello, \"world\" <3 "),
    ("assistant", "Hi! "),
    ("user", "Why?"),
];

#[test]
fn chatml() {
    let Some(template) = template("chatml", "<|im_start|>", "<|im_end|>") else {
        return;
    };
    assert_eq!(
        render(&template, &FIVE, true).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Hello, \"world\" <3 <|im_end|>\n\
         <|im_start|>assistant\nHi! <|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        render(&template, &FIVE[1..2], false).unwrap(),
        "<|im_start|>user\n  Hello, \"world\" <3 <|im_end|>\n"
    );
}

#[test]
fn llama2() {
    let Some(template) = template("llama2", "<s>", "</s>") else {
        return;
    };
    assert_eq!(
        render(&template, &FIVE, true).unwrap(),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n  Hello, \"world\" <3 [/INST] Hi! </s><s>[INST] Why? [/INST]"
    );
    assert_eq!(
        render(&template, &FIVE[1..2], true).unwrap(),
        "<s>[INST] Hello, \"world\" <3 [/INST]"
    );
    assert_eq!(
        render(&template, &FIVE[2..], true),
        Err(ChatError::Refused(REFUSAL.into()))
    );
}

#[test]
fn llama3() {
    let Some(template) = template("llama3", "<|begin_of_text|>", "<|eot_id|>") else {
        return;
    };
    assert_eq!(
        render(&template, &FIVE, true).unwrap(),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHello, \"world\" <3<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn mistral() {
    let Some(template) = template("mistral", "<s>", "</s>") else {
        return;
    };
    assert_eq!(
        render(&template, &FIVE[1..], true).unwrap(),
        "<s>[INST]   Hello, \"world\" <3  [/INST]Hi! </s> [INST] Why? [/INST]"
    );
    // A system turn comes where a user's is due.
    assert_eq!(
        render(&template, &FIVE, true),
        Err(ChatError::Refused(REFUSAL.into()))
    );
}

/// The part of Qwen2.5's template that concerns functions, as published with the model.
const QWEN: &str = r#"{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {{- "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." }}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;

/// In the manner of Llama 3.1: functions in the first user turn, a call as the whole answer.
const LLAMA: &str = r#"{{- bos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
        {%- if loop.first and tools is not none %}
            {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
        {%- endif %}
        {{- message.content + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}"#;

fn compiled(source: &str) -> ChatTemplate {
    let control = ControlNames::new(["<|im_start|>", "<|im_end|>"].map(str::to_owned)).unwrap();
    ChatTemplate::new(source.as_bytes(), None, None, control).unwrap()
}

#[test]
fn call_formats_are_found_by_what_templates_write() {
    assert_eq!(compiled(QWEN).call_format(), Some(CallFormat::Tagged));
    assert_eq!(compiled(LLAMA).call_format(), Some(CallFormat::Bare));
    // It mentions functions, but shows none to the model, or shows calls in a way of its own.
    assert_eq!(compiled("{% if tools %}no{% endif %}").call_format(), None);
    assert_eq!(
        compiled("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}")
            .call_format(),
        None
    );
    for family in ["chatml", "llama2", "llama3", "mistral"] {
        if let Some(template) = template(family, "<s>", "</s>") {
            assert_eq!(template.call_format(), None, "{family}");
        }
    }
}

#[test]
fn functions_calls_and_results_are_rendered_as_qwen_expects() {
    let template = compiled(QWEN);
    let weather = json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}});
    let user = conversation(&[("user", "Rain?")]);
    let call = ChatMessage {
        role: "assistant".into(),
        tool_calls: vec![ToolCall {
            id: "call_1".into(),
            kind: "function",
            function: FunctionCall {
                name: "weather".into(),
                arguments: json!({"place": "Bonn \u{fc}"}),
            },
        }],
        ..ChatMessage::default()
    };
    let result = ChatMessage {
        role: "tool".into(),
        content: "wet".into(),
        tool_call_id: Some("call_1".into()),
        ..ChatMessage::default()
    };
    let messages = [user[0].clone(), call, result];
    let now = OffsetDateTime::UNIX_EPOCH;
    let prompt = template
        .render_with_tools(&messages, &[weather], true, now)
        .unwrap();
    assert_eq!(
        prompt.text(),
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n\
         You may call one or more functions to assist with the user query.\n\nYou are provided with function \
         signatures within <tools></tools> XML tags:\n<tools>\n{\"type\": \"function\", \"function\": {\"name\": \
         \"weather\", \"parameters\": {\"type\": \"object\", \"properties\": {\"b\": {}, \"a\": {}}}}}\n\
         </tools><|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{\"name\": \
         \"weather\", \"arguments\": {\"place\": \"Bonn \u{fc}\"}}\n</tool_call><|im_end|>\n<|im_start|>user\n\
         <tool_response>\nwet\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    );
}
