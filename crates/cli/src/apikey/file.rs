//! The provider's list of API keys: TOML with one `[[key]]` for each.

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU32;
use std::path::Path;

use anyhow::anyhow;
use casemate_attest::TomlFault;
use casemate_release::api_key::{self, ApiKey, ApiKeys, Limits, MAX_API_KEYS};
use serde::{Deserialize, Serialize};

use crate::exit::{Class, Failure};
use crate::secret_file;

/// Largest list that is read, in bytes: several times what 256 keys need.
const MAX_BYTES: u64 = 256 << 10;

const INTRODUCTION: &str = "\
# API keys of users, known by their SHA-256. `casemate apikey new` appends to this list and `casemate grant --api-keys`
# signs it; `casemate apikey remove` takes one out. What is not named is not limited.
";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    #[serde(default)]
    key: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_minute: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    concurrency: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_day: Option<NonZeroU32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_day: Option<NonZeroU32>,
}

/// Reads and checks a list, which may be empty; in order of names.
pub(crate) fn read(path: &Path) -> Result<Vec<ApiKey>, Failure> {
    let text = text(path).map_err(|error| io_failure(path, error))?;
    parse(path, &text)
}

/// Adds a key to the list, which is made if it does not exist. What is there stays as it was written, remarks included.
pub(crate) fn append(path: &Path, key: ApiKey) -> Result<(), Failure> {
    let mut text = match text(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => INTRODUCTION.to_owned(),
        Err(error) => return Err(io_failure(path, error)),
    };
    let mut keys = parse(path, &text)?;
    let shown = path.display();
    if keys.iter().any(|known| known.name == key.name) {
        let name = &key.name;
        let error = anyhow!(
            "{shown} already has a key '{name}'; `casemate apikey remove {name}` takes it out"
        );
        return Err(Failure::new(Class::Usage, "key-exists", error));
    }
    if keys.len() == MAX_API_KEYS {
        let error = anyhow!("{shown} has {MAX_API_KEYS} keys already, the most that a grant takes");
        return Err(Failure::new(Class::Usage, "too-many-keys", error));
    }
    let added = List {
        key: vec![Entry {
            name: key.name.clone(),
            sha256: hex::encode(key.hash),
            requests_per_minute: key.limits.requests_per_minute,
            tokens_per_minute: key.limits.tokens_per_minute,
            concurrency: key.limits.concurrency,
            requests_per_day: key.limits.requests_per_day,
            tokens_per_day: key.limits.tokens_per_day,
        }],
    };
    keys.push(key);
    checked(path, keys)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text.push('\n');
    text.push_str(&toml::to_string(&added).map_err(Failure::io)?);
    write(path, &text)
}

/// Takes a key out of the list, with the remarks right above its entry; the rest stays as it was written. How many are
/// left, or none if there is no such key.
pub(crate) fn remove(path: &Path, name: &str) -> Result<Option<usize>, Failure> {
    let text = text(path).map_err(|error| io_failure(path, error))?;
    let mut keys = parse(path, &text)?;
    let Some(at) = keys.iter().position(|key| key.name == name) else {
        return Ok(None);
    };
    keys.remove(at);
    // What is written must list exactly the others, however the file is laid out.
    let rest = without(&text, name).filter(|rest| parse(path, rest).is_ok_and(|left| left == keys));
    let Some(rest) = rest else {
        let error = anyhow!(
            "the entries are not laid out as `[[key]]`, one after another; take {name:?} out by hand"
        );
        return Err(malformed(path, error));
    };
    write(path, &rest)?;
    Ok(Some(keys.len()))
}

/// The text without the entry of this name, if each begins with a line `[[key]]`.
fn without(text: &str, name: &str) -> Option<String> {
    let list: List = toml::from_str(text).ok()?;
    let at = list.key.iter().position(|entry| entry.name == name)?;
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let is_remark = |line: &str| line.trim_start().starts_with('#');
    let is_blank = |line: &str| line.trim().is_empty();
    let mut headers = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| line.trim_start().starts_with("[[key]]"))
        .map(|(index, _)| index);
    let header = headers.nth(at)?;
    let next = headers.next().unwrap_or(lines.len());
    // With the remarks right above, and one of the blank lines around.
    let above = lines[..header].iter().rev();
    let mut from = header - above.take_while(|line| is_remark(line)).count();
    if from > 0 && is_blank(lines[from - 1]) {
        from -= 1;
    }
    // What stands between this entry and the next belongs to the next.
    let below = lines[header..next].iter().rev();
    let to = next
        - below
            .take_while(|line| is_remark(line) || is_blank(line))
            .count();
    Some([&lines[..from], &lines[to..]].concat().concat())
}

/// As one file: a list that is cut in the middle would lock out everybody after the cut.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    secret_file::write(path, text.as_bytes(), true)
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)?;
    if read as u64 > MAX_BYTES {
        return Err(io::Error::other("the list is too large"));
    }
    Ok(text)
}

fn parse(path: &Path, text: &str) -> Result<Vec<ApiKey>, Failure> {
    parse_list(path, text).map_err(|failure| {
        // Easily mistaken for the list. Nothing of it may be shown, not even by what is wrong with a name or value.
        if !api_key::is_in(text) {
            return failure;
        }
        let error = anyhow!(
            "this is an API key; the list is api-keys.toml, or what `casemate apikey new --file` named"
        );
        malformed(path, error)
    })
}

fn parse_list(path: &Path, text: &str) -> Result<Vec<ApiKey>, Failure> {
    let list: List = toml::from_str(text)
        .map_err(|error| malformed(path, anyhow!("{}", TomlFault::new(text, &error))))?;
    let mut keys = Vec::with_capacity(list.key.len());
    for entry in list.key {
        let mut hash = [0; 32];
        hex::decode_to_slice(&entry.sha256, &mut hash).map_err(|_| {
            let name = &entry.name;
            malformed(path, anyhow!("sha256 of {name:?} is not 64 hex digits"))
        })?;
        keys.push(ApiKey {
            name: entry.name,
            hash,
            limits: Limits {
                requests_per_minute: entry.requests_per_minute,
                tokens_per_minute: entry.tokens_per_minute,
                concurrency: entry.concurrency,
                requests_per_day: entry.requests_per_day,
                tokens_per_day: entry.tokens_per_day,
            },
        });
    }
    checked(path, keys)
}

/// A list without keys is one that is being written; a grant takes none.
fn checked(path: &Path, keys: Vec<ApiKey>) -> Result<Vec<ApiKey>, Failure> {
    if keys.is_empty() {
        return Ok(keys);
    }
    let keys = ApiKeys::new(keys).map_err(|error| malformed(path, error))?;
    Ok(keys.as_slice().to_vec())
}

/// The failure of a command whose list cannot be used.
pub(crate) fn malformed(path: &Path, error: impl Into<anyhow::Error>) -> Failure {
    let error = error.into().context(path.display().to_string());
    Failure::new(Class::Malformed, "api-keys", error)
}

fn io_failure(path: &Path, error: io::Error) -> Failure {
    Failure::io(anyhow::Error::from(error).context(path.display().to_string()))
}
