//! How many connections the limit on descriptors allows. A file of its own, since it changes that limit for its process.

use casemate_listen::{Limits, connections_within_descriptors};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn set(current: u64, maximum: u64) {
    let (current, maximum) = (Some(current), Some(maximum));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

#[test]
fn connections_stay_within_the_descriptors() {
    set(100, 1000);
    assert_eq!(connections_within_descriptors(0), 936);
    // What was asked of the system was done: the soft limit is the hard one now.
    assert_eq!(getrlimit(Resource::Nofile).current, Some(1000));
    assert_eq!(connections_within_descriptors(512), 424);
    let places = |connections| {
        let limits = Limits {
            connections,
            ..Limits::default()
        };
        limits.within_descriptors().connections
    };
    assert_eq!((places(4096), places(10)), (936, 10));
    // However few there are, one is served at a time.
    assert_eq!(connections_within_descriptors(936), 1);
    assert_eq!(connections_within_descriptors(2000), 1);
}
