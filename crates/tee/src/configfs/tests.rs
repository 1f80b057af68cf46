use std::collections::HashMap;
use std::sync::Mutex;

use super::*;

const DATA: ReportData = ReportData::new([9; 64]);

/// The kernel's side, as its documentation describes it, with faults to order.
#[derive(Default)]
struct Kernel {
    provider: &'static str,
    /// Writes by somebody else between our write and our read.
    intruders: u64,
    outblob_error: Option<io::ErrorKind>,
    generation_text: Option<&'static str>,
    outblob_length: Option<usize>,
    occupied: u64,
    entries: Mutex<HashMap<String, (u64, Vec<u8>)>>,
    calls: Mutex<Vec<String>>,
}

impl Kernel {
    fn new() -> Kernel {
        Kernel {
            provider: "tdx_guest\n",
            ..Kernel::default()
        }
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    fn quote(&self) -> Result<Vec<u8>, TeeError> {
        ConfigfsTsm::at("/reports".into(), None).quote_through(self, &DATA)
    }
}

impl Reports for Kernel {
    fn create(&self, name: &str) -> io::Result<()> {
        self.calls.lock().unwrap().push("mkdir".into());
        let made = self.calls().iter().filter(|call| *call == "mkdir").count() as u64;
        if made <= self.occupied {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.entries
            .lock()
            .unwrap()
            .insert(name.into(), (40, Vec::new()));
        Ok(())
    }

    fn read(&self, name: &str, attribute: &str, limit: usize) -> io::Result<Option<Vec<u8>>> {
        self.calls.lock().unwrap().push(format!("read {attribute}"));
        let mut entries = self.entries.lock().unwrap();
        let (generation, inblob) = entries.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
        let value = match attribute {
            "provider" => self.provider.as_bytes().to_vec(),
            "generation" => match self.generation_text {
                Some(text) => text.as_bytes().to_vec(),
                None => format!("{generation}\n").into_bytes(),
            },
            "outblob" => {
                if let Some(kind) = self.outblob_error {
                    return Err(kind.into());
                }
                *generation += self.intruders;
                let mut quote = b"quote over ".to_vec();
                quote.extend_from_slice(inblob);
                quote.resize(self.outblob_length.unwrap_or(quote.len()), 0);
                quote
            }
            other => panic!("reads {other}"),
        };
        Ok((value.len() <= limit).then_some(value))
    }

    fn write(&self, name: &str, attribute: &str, value: &[u8]) -> io::Result<()> {
        assert_eq!(attribute, "inblob");
        self.calls
            .lock()
            .unwrap()
            .push(format!("write {attribute}"));
        let mut entries = self.entries.lock().unwrap();
        let (generation, inblob) = entries.get_mut(name).ok_or(io::ErrorKind::NotFound)?;
        *generation += 1;
        *inblob = value.to_vec();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.calls.lock().unwrap().push("rmdir".into());
        self.entries
            .lock()
            .unwrap()
            .remove(name)
            .map(|_| ())
            .ok_or(io::ErrorKind::NotFound.into())
    }
}

#[test]
fn writes_once_reads_between_two_generations_and_removes_the_entry() {
    let kernel = Kernel::new();
    let mut expected = b"quote over ".to_vec();
    expected.extend_from_slice(DATA.as_bytes());
    assert_eq!(kernel.quote().unwrap(), expected);
    assert_eq!(
        kernel.calls(),
        [
            "mkdir",
            "read provider",
            "read generation",
            "write inblob",
            "read outblob",
            "read generation",
            "rmdir"
        ]
    );
    assert!(kernel.entries.lock().unwrap().is_empty());
}

#[test]
fn refuses_a_quote_that_may_answer_somebody_elses_write() {
    let kernel = Kernel {
        intruders: 1,
        ..Kernel::new()
    };
    let error = kernel.quote().unwrap_err();
    assert!(matches!(
        error,
        TeeError::Interference {
            found: 42,
            expected: 41
        }
    ));
    assert!(kernel.entries.lock().unwrap().is_empty());
}

#[test]
fn refuses_another_provider_before_writing() {
    let kernel = Kernel {
        provider: "sev_guest\n",
        ..Kernel::new()
    };
    let error = kernel.quote().unwrap_err();
    assert!(matches!(error, TeeError::OtherProvider { found } if found == "sev_guest"));
    assert_eq!(kernel.calls(), ["mkdir", "read provider", "rmdir"]);
}

#[test]
fn removes_the_entry_after_every_failure() {
    type Expected = fn(&TeeError) -> bool;
    let cases: [(Kernel, Expected); 4] = [
        (
            Kernel {
                outblob_error: Some(io::ErrorKind::TimedOut),
                ..Kernel::new()
            },
            |error| matches!(error, TeeError::Unavailable { path, .. } if path.ends_with("outblob")),
        ),
        (
            Kernel {
                outblob_length: Some(MAX_QUOTE + 1),
                ..Kernel::new()
            },
            |error| {
                matches!(
                    error,
                    TeeError::TooLarge {
                        what: "outblob",
                        ..
                    }
                )
            },
        ),
        (
            Kernel {
                generation_text: Some("soon"),
                ..Kernel::new()
            },
            |error| matches!(error, TeeError::Malformed { what: "generation" }),
        ),
        (
            Kernel {
                generation_text: Some("-1"),
                ..Kernel::new()
            },
            |error| matches!(error, TeeError::Malformed { what: "generation" }),
        ),
    ];
    for (kernel, expected) in cases {
        let error = kernel.quote().unwrap_err();
        assert!(expected(&error), "{error:?}");
        assert_eq!(kernel.calls().last().unwrap(), "rmdir");
        assert!(kernel.entries.lock().unwrap().is_empty());
    }
}

#[test]
fn passes_over_entries_left_behind_but_not_for_ever() {
    let kernel = Kernel {
        occupied: 3,
        ..Kernel::new()
    };
    assert!(kernel.quote().is_ok());
    let full = Kernel {
        occupied: u64::MAX,
        ..Kernel::new()
    };
    let error = full.quote().unwrap_err();
    assert!(matches!(
        error,
        TeeError::Unavailable { source, .. } if source.kind() == io::ErrorKind::AlreadyExists
    ));
    assert_eq!(full.calls().len(), NAMES as usize);
}

#[test]
fn a_guest_without_the_interface_says_which_directory_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("tsm/report");
    let error = ConfigfsTsm::at(missing.clone(), None)
        .quote(&DATA)
        .unwrap_err();
    assert!(matches!(
        error,
        TeeError::Unavailable { path, source }
            if path == missing && source.kind() == io::ErrorKind::NotFound
    ));
}

/// The real directory operations, with a FIFO for `inblob` so that the number of writes shows.
#[test]
fn directory_operations_read_and_write_attributes() {
    let root = tempfile::tempdir().unwrap();
    let reports = Directory(root.path());
    reports.create("e").unwrap();
    assert_eq!(
        reports.create("e").unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    let entry = root.path().join("e");
    std::fs::write(entry.join("outblob"), b"quote").unwrap();
    assert_eq!(reports.read("e", "outblob", 5).unwrap().unwrap(), b"quote");
    assert_eq!(reports.read("e", "outblob", 4).unwrap(), None);
    assert_eq!(
        reports.read("e", "auxblob", 4).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );

    let fifo = entry.join("inblob");
    let made = process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let reader = std::thread::spawn({
        let fifo = fifo.clone();
        move || {
            let mut buffer = [0; 256];
            let read = File::open(fifo).unwrap().read(&mut buffer).unwrap();
            buffer[..read].to_vec()
        }
    });
    reports.write("e", "inblob", DATA.as_bytes()).unwrap();
    assert_eq!(reader.join().unwrap(), DATA.as_bytes());

    assert!(
        reports.remove("e").is_err(),
        "an ordinary directory with files stays"
    );
    std::fs::remove_file(fifo).unwrap();
    std::fs::remove_file(entry.join("outblob")).unwrap();
    reports.remove("e").unwrap();
    assert!(!entry.exists());
}

#[test]
fn collateral_comes_from_its_file_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("collateral.json");
    let tsm = ConfigfsTsm::at("/none".into(), Some(path.clone()));
    assert!(matches!(tsm.quote(&DATA), Err(TeeError::Unavailable { path: at, .. }) if at == path));
    std::fs::write(&path, b"{}").unwrap();
    assert!(matches!(tsm.quote(&DATA), Err(TeeError::Malformed { .. })));
    std::fs::write(&path, vec![b' '; MAX_EVIDENCE_JSON + 1]).unwrap();
    assert!(matches!(tsm.quote(&DATA), Err(TeeError::TooLarge { .. })));
}
