//! `casemate apikey` as a provider runs it: the list, and who is taken out of it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

fn apikey(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_casemate"))
        .current_dir(folder)
        .arg("apikey")
        .args(arguments)
        .output()
        .unwrap()
}

fn text(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

/// Three keys; the second has limits.
fn list() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let limits = ["--requests-per-minute", "60", "--concurrency", "2"];
    let budget = ["--requests-per-day", "500", "--tokens-per-day", "90000"];
    for (name, limits) in [("carol", &budget[..]), ("bob", &limits), ("alice", &[])] {
        let output = apikey(folder.path(), &[&["new", name], limits].concat());
        assert!(output.status.success(), "{output:?}");
    }
    folder
}

fn read(folder: &TempDir) -> String {
    std::fs::read_to_string(folder.path().join("api-keys.toml")).unwrap()
}

fn names(folder: &TempDir) -> Vec<String> {
    let output = apikey(folder.path(), &["list", "--json"]);
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = listed["keys"].as_array().unwrap();
    let name = |key: &Value| key["name"].as_str().unwrap().to_owned();
    keys.iter().map(name).collect()
}

#[test]
fn a_list_shows_names_and_limits_and_nothing_secret() {
    let folder = list();
    let output = apikey(folder.path(), &["list"]);
    assert!(output.status.success());
    assert_eq!(
        text(&output),
        "alice  not limited\nbob    60 requests per minute, 2 at the same time\ncarol  500 requests per day, 90000 \
         tokens per day\n"
    );
    let output = apikey(folder.path(), &["list", "--json"]);
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(listed["file"], "api-keys.toml");
    let none = Value::Null;
    assert_eq!(
        listed["keys"][1],
        json!({ "name": "bob", "requests_per_minute": 60, "tokens_per_minute": none, "concurrency": 2,
                "requests_per_day": none, "tokens_per_day": none })
    );
    let carol = &listed["keys"][2];
    assert_eq!(carol["requests_per_day"], 500);
    assert_eq!(carol["tokens_per_day"], 90_000);
    let file = read(&folder);
    let hashes = file
        .lines()
        .filter_map(|line| line.strip_prefix("sha256 = "));
    assert_eq!(hashes.clone().count(), 3);
    for hash in hashes {
        assert!(!text(&output).contains(hash.trim_matches('"')));
    }
    let missing = apikey(folder.path(), &["list", "--file", "missing.toml"]);
    assert_eq!(missing.status.code(), Some(40));
}

#[test]
fn a_removed_key_is_out_and_everything_else_is_as_it_was_written() {
    let folder = list();
    let path = folder.path().join("api-keys.toml");
    let before = read(&folder);
    // With remarks: of the list, of each entry, and at the end.
    let entries: Vec<_> = before.split("[[key]]").collect();
    let [introduction, carol, bob, alice] = entries[..] else {
        panic!("{before}");
    };
    let written = format!(
        "{introduction}# Carol\n[[key]]{carol}# Bob,\n# of accounting\n[[key]]{bob}# Alice\n[[key]]{alice}\n# end\n"
    );
    std::fs::write(&path, &written).unwrap();
    let output = apikey(folder.path(), &["remove", "bob"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("until a grant of this list was put"),
        "{said}"
    );
    let without_bob =
        format!("{introduction}# Carol\n[[key]]{carol}# Alice\n[[key]]{alice}\n# end\n");
    assert_eq!(read(&folder), without_bob);
    assert_eq!(names(&folder), ["alice", "carol"]);
    // The last entry, then the first: the remark at the end stays.
    let json = apikey(folder.path(), &["remove", "alice", "--json"]);
    let removed: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (&removed["name"], &removed["keys_left"]),
        (&json!("alice"), &json!(1))
    );
    let said = apikey(folder.path(), &["remove", "carol"]);
    let said = String::from_utf8(said.stderr).unwrap();
    assert!(said.contains("no key is left"), "{said}");
    assert_eq!(
        read(&folder).trim_end(),
        format!("{}\n\n# end", introduction.trim_end())
    );
    assert_eq!(names(&folder), [""; 0]);
    // And the name can be given again.
    assert!(apikey(folder.path(), &["new", "bob"]).status.success());
    assert_eq!(names(&folder), ["bob"]);
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1, "nothing is left behind");
}

#[test]
fn what_cannot_be_removed_changes_nothing() {
    let folder = list();
    let before = read(&folder);
    let output = apikey(folder.path(), &["remove", "dave", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let error: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["error"]["code"], "no-such-key");
    let message = error["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("api-keys.toml lists no API key of the name \"dave\""),
        "{message}"
    );
    assert_eq!(read(&folder), before);
    let output = apikey(folder.path(), &["remove", "bob", "--file", "missing.toml"]);
    assert_eq!(output.status.code(), Some(40));

    // Another way to write the same, and headers that are none.
    let hash = |digit: &str| digit.repeat(64);
    let inline = format!(
        "key = [{{ name = \"a\", sha256 = \"{}\" }}, {{ name = \"b\", sha256 = \"{}\" }}]\n",
        hash("1"),
        hash("2")
    );
    let path = folder.path().join("api-keys.toml");
    std::fs::write(&path, &inline).unwrap();
    let output = apikey(folder.path(), &["remove", "a"]);
    assert_eq!(output.status.code(), Some(10));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("take \"a\" out by hand"), "{said}");
    assert_eq!(read(&folder), inline);
}

/// A key's file where the list belongs is the easiest thing to mistake; whatever its content looks like, the key is not shown.
#[test]
fn an_api_key_in_the_place_of_the_list_is_not_shown() {
    let folder = tempfile::tempdir().unwrap();
    let made = apikey(folder.path(), &["new", "bob"]);
    let key = text(&made).trim();
    let digits = key.strip_prefix("cm-").unwrap();
    let file = folder.path().join("bob.key");
    let grant: Vec<_> = "--data-key k --signing-key k --model m --out g --api-keys bob.key"
        .split(' ')
        .collect();
    for content in [
        format!("{key}\n"),
        format!("API_KEY={key}\n"),
        format!("{key} = 1\n"),
        format!("key = \"{key}\"\n"),
        format!("[[key]]\nname = \"{key}\"\nsha256 = \"{digits}\"\n"),
        format!("[[key]]\nname = \"bob\"\nsha256 = \"{key}\"\n"),
        format!("[[key]]\nname = \"bob\"\nrequests_per_minute = \"{key}\"\n"),
    ] {
        std::fs::write(&file, &content).unwrap();
        let outputs = [
            apikey(folder.path(), &["list", "--file", "bob.key"]),
            apikey(folder.path(), &["list", "--json", "--file", "bob.key"]),
            apikey(folder.path(), &["new", "eve", "--file", "bob.key"]),
            apikey(folder.path(), &["remove", "eve", "--file", "bob.key"]),
            Command::new(env!("CARGO_BIN_EXE_casemate"))
                .current_dir(folder.path())
                .arg("grant")
                .args(&grant)
                .output()
                .unwrap(),
        ];
        for output in outputs {
            assert_eq!(output.status.code(), Some(10), "{content}");
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8(said).unwrap();
            assert!(!said.contains(digits), "{said}");
            let told = "bob.key: this is an API key; the list is api-keys.toml";
            assert!(said.contains(told), "{said}");
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
    }
}

#[test]
fn a_list_that_is_wrong_is_told_by_place_and_not_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("api-keys.toml");
    std::fs::write(&file, "[[key]]\nname = \"bob\" CANARY\n").unwrap();
    let output = apikey(folder.path(), &["list"]);
    assert_eq!(output.status.code(), Some(10));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("api-keys.toml: line 2, column "), "{said}");
    assert!(!said.contains("CANARY"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn what_a_new_key_cannot_be_is_a_mistake_of_the_command() {
    let folder = list();
    let before = read(&folder);
    let refused = |arguments: &[&str]| {
        let output = apikey(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(text(&output), "", "no key is shown that is in no list");
        assert_eq!(read(&folder), before);
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(
        refused(&["new", "bob"]),
        "casemate: api-keys.toml already has a key 'bob'; `casemate apikey remove bob` takes it out\n"
    );
    let told = "the name of an API key is 1 to 32 letters, digits, '.', '_' or '-'";
    for name in ["Dr. House", "", "ü"] {
        let said = refused(&["new", name]);
        assert!(said.contains(told), "{said}");
    }
    for number in ["0", "-1", "x", "4294967296"] {
        let option = format!("--requests-per-minute={number}");
        let said = refused(&["new", "eve", &option]);
        assert!(
            said.contains("a whole number from 1 to 4294967295"),
            "{said}"
        );
    }
    let key = format!("cm-{}", "5".repeat(64));
    for command in ["new", "remove"] {
        let said = refused(&[command, &key]);
        assert!(!said.contains(&key), "{said}");
    }

    let mut full = String::new();
    for number in 0..256 {
        full += &format!("[[key]]\nname = \"k{number}\"\nsha256 = \"{number:064x}\"\n");
    }
    std::fs::write(folder.path().join("full.toml"), full).unwrap();
    let said = refused(&["new", "eve", "--file", "full.toml"]);
    assert!(said.contains("full.toml has 256 keys already"), "{said}");
}
