//! Published chat templates render the formats that their models were trained on. The expected
//! texts are written from the published descriptions of the formats, not from a run.

use std::fs;

use casemate_engine::{ChatError, ChatMessage, ChatTemplate, ControlNames};
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
