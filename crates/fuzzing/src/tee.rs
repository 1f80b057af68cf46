//! The protocol with quoting services, both directions.

use casemate_attest::ReportData;
use casemate_tee::wire::{
    MAX_REQUEST, MAX_RESPONSE, Response, encode_request, parse_request, read_frame, write_frame,
};

use crate::attest::honest;

/// Bytes on the socket as a sequence of frames, each read as a request and as an answer.
pub(crate) fn wire(data: &[u8]) {
    let mut rest = data;
    while let Ok(frame) = read_frame(&mut rest, MAX_RESPONSE) {
        assert!(frame.len() <= data.len());
        let mut again = Vec::new();
        write_frame(&mut again, &frame).expect("memory takes all bytes");
        assert_eq!(
            read_frame(&mut &again[..], MAX_RESPONSE).expect("a frame"),
            frame
        );
        if frame.len() <= MAX_REQUEST
            && let Ok(report_data) = parse_request(&frame)
        {
            assert_eq!(
                parse_request(&encode_request(&report_data)),
                Ok(report_data)
            );
        }
        if let Ok(Response::Evidence(evidence)) = serde_json::from_slice(&frame) {
            evidence.digest();
        }
    }
}

pub(crate) fn wire_seeds() -> Vec<Vec<u8>> {
    let evidence = Response::Evidence(Box::new(honest().evidence.clone()));
    let messages = [
        encode_request(&ReportData::new([7; 64])),
        serde_json::to_vec(&evidence).expect("evidence has a JSON form"),
        br#"{"error":"no"}"#.to_vec(),
    ];
    let framed = messages.map(|message| {
        let mut frame = Vec::new();
        write_frame(&mut frame, &message).expect("memory takes all bytes");
        frame
    });
    framed.into()
}
