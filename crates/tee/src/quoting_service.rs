//! Quotes from a service on a Unix socket, over one connection for the life of the process.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use casemate_attest::{Evidence, ReportData};

use crate::wire::{self, MAX_RESPONSE, Response, Timed, WireError};
use crate::{QuoteProvider, TeeError};

/// A connection to a quoting service.
///
/// The service measures its peer when it accepts the connection, so there is one connection and it is never replaced:
/// a program that forbids others to look at it, as the enclave does once it holds keys, could not be measured again.
pub struct QuotingService {
    path: PathBuf,
    timeout: Duration,
    /// `None` once an exchange failed part-way, since what follows could answer the wrong question.
    stream: Mutex<Option<UnixStream>>,
}

impl QuotingService {
    /// Connects, and asks for one quote over zeros, which is thrown away: when this returns, the service has measured
    /// this process and is known to work. `timeout` bounds each exchange.
    pub fn connect(path: &Path, timeout: Duration) -> Result<QuotingService, TeeError> {
        let stream = UnixStream::connect(path).map_err(|source| TeeError::Unavailable {
            path: path.to_path_buf(),
            source,
        })?;
        let service = QuotingService {
            path: path.to_path_buf(),
            timeout,
            stream: Mutex::new(Some(stream)),
        };
        service.quote(&ReportData::new([0; 64]))?;
        Ok(service)
    }

    fn exchange(
        &self,
        stream: &UnixStream,
        report_data: &ReportData,
    ) -> Result<Response, TeeError> {
        let mut timed = Timed::new(stream, self.timeout);
        wire::write_frame(&mut timed, &wire::encode_request(report_data))
            .map_err(|error| self.failed(error))?;
        let answer = wire::read_frame(&mut timed, MAX_RESPONSE).map_err(|error| match error {
            WireError::Io(error) => self.failed(error),
            WireError::Closed => self.failed(io::ErrorKind::UnexpectedEof.into()),
            WireError::TooLarge { limit, .. } => TeeError::TooLarge {
                what: "the quoting service's answer",
                limit,
            },
        })?;
        serde_json::from_slice(&answer).map_err(|_| TeeError::Malformed {
            what: "the quoting service's answer",
        })
    }

    fn failed(&self, source: io::Error) -> TeeError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::TimedOut => TeeError::TimedOut { path },
            _ => TeeError::Unavailable { path, source },
        }
    }
}

impl QuoteProvider for QuotingService {
    fn name(&self) -> &'static str {
        "quoting-service"
    }

    fn quote(&self, report_data: &ReportData) -> Result<Evidence, TeeError> {
        let mut slot = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = slot.take().ok_or_else(|| TeeError::ConnectionLost {
            path: self.path.clone(),
        })?;
        let response = self.exchange(&stream, report_data)?;
        *slot = Some(stream);
        drop(slot);
        match response {
            Response::Evidence(evidence) => {
                evidence.check_limits()?;
                Ok(*evidence)
            }
            Response::Error(reason) => Err(TeeError::Refused { reason }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    use super::*;

    const EVIDENCE: &[u8] = b"{\"evidence\":{\"tee\":\"tdx\",\"quote\":\"AQID\"}}";
    const SOON: Duration = Duration::from_millis(300);

    /// A service that gives these answers, one per request, as raw bytes after the length it is told to announce.
    fn service(
        answers: Vec<(u32, Vec<u8>)>,
    ) -> (tempfile::TempDir, PathBuf, JoinHandle<Vec<ReportData>>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            for (length, answer) in answers {
                let Ok(request) = wire::read_frame(&mut stream, 1024) else {
                    break;
                };
                asked.push(wire::parse_request(&request).unwrap());
                stream.write_all(&length.to_be_bytes()).unwrap();
                // A client that refuses the length closes without reading on.
                let _ = stream.write_all(&answer);
            }
            // Until the client closes.
            let _ = stream.read(&mut [0]);
            asked
        });
        (directory, path, thread)
    }

    fn framed(answer: &[u8]) -> (u32, Vec<u8>) {
        (answer.len() as u32, answer.to_vec())
    }

    #[test]
    fn asks_for_the_given_report_data_over_one_connection() {
        let (_directory, path, thread) = service(vec![framed(EVIDENCE); 3]);
        let provider = QuotingService::connect(&path, SOON).unwrap();
        let evidence = provider.quote(&ReportData::new([8; 64])).unwrap();
        assert_eq!(evidence.quote, [1, 2, 3]);
        provider.quote(&ReportData::new([9; 64])).unwrap();
        drop(provider);
        let expected = [[0; 64], [8; 64], [9; 64]].map(ReportData::new);
        assert_eq!(thread.join().unwrap(), expected);
    }

    #[test]
    fn a_refusal_is_told_and_the_connection_lives_on() {
        let refusal = framed(b"{\"error\":\"not now\"}");
        let (_directory, path, _thread) =
            service(vec![framed(EVIDENCE), refusal, framed(EVIDENCE)]);
        let provider = QuotingService::connect(&path, SOON).unwrap();
        let refused = provider.quote(&ReportData::new([1; 64]));
        assert!(matches!(refused, Err(TeeError::Refused { reason }) if reason == "not now"));
        assert!(provider.quote(&ReportData::new([1; 64])).is_ok());
    }

    #[test]
    fn refuses_answers_that_are_not_as_agreed_and_never_trusts_the_connection_again() {
        let too_large = (MAX_RESPONSE as u32 + 1, Vec::new());
        let cut_short = (100, b"{".to_vec());
        type Expected = fn(&TeeError) -> bool;
        let cases: [((u32, Vec<u8>), Expected); 4] = [
            (framed(b"{\"evidence\":1}"), |error| {
                matches!(error, TeeError::Malformed { .. })
            }),
            (framed(b"\xff\xfe"), |error| {
                matches!(error, TeeError::Malformed { .. })
            }),
            (too_large, |error| {
                matches!(
                    error,
                    TeeError::TooLarge {
                        limit: MAX_RESPONSE,
                        ..
                    }
                )
            }),
            (cut_short, |error| {
                matches!(error, TeeError::TimedOut { .. })
            }),
        ];
        for (answer, expected) in cases {
            let (_directory, path, _thread) =
                service(vec![framed(EVIDENCE), answer.clone(), framed(EVIDENCE)]);
            let provider = QuotingService::connect(&path, SOON).unwrap();
            let error = provider.quote(&ReportData::new([1; 64])).unwrap_err();
            assert!(expected(&error), "{answer:?} gave {error:?}");
            let again = provider.quote(&ReportData::new([1; 64]));
            assert!(matches!(again, Err(TeeError::ConnectionLost { .. })));
        }
    }

    #[test]
    fn a_service_that_is_not_there_is_unavailable() {
        let directory = tempfile::tempdir().unwrap();
        let result = QuotingService::connect(&directory.path().join("none"), SOON);
        assert!(matches!(result.err(), Some(TeeError::Unavailable { .. })));
    }

    #[test]
    fn a_service_that_hangs_up_at_once_does_not_connect() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || drop(listener.accept()));
        let result = QuotingService::connect(&path, SOON);
        assert!(matches!(result.err(), Some(TeeError::Unavailable { .. })));
        thread.join().unwrap();
    }
}
