//! Hosts of their own for programs of a test: network namespaces, where the machine permits them.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Output};

use casemate_testkit::deployment::WorkerPlace;

const IP: &str = "/usr/sbin/ip";

/// A network namespace, linked to this one by a pair of interfaces; gone when dropped.
pub struct Namespace {
    name: String,
    address: Ipv4Addr,
}

impl Namespace {
    /// A new one, told from others of this process by its number.
    ///
    /// # Errors
    /// Why there is none: most often that only root may make one.
    pub fn new(number: u8) -> io::Result<Namespace> {
        let pid = std::process::id();
        let name = format!("casemate-{pid}-{number}");
        // A network of four addresses for each, somewhere in 10.128.0.0/9.
        let network = 0x0a80_0000 | (pid << 4 | u32::from(number) << 2) & 0x007f_fffc;
        let near = Ipv4Addr::from(network | 1);
        let (outer, inner) = (format!("cm{pid:x}o{number}"), format!("cm{pid:x}i{number}"));
        ip(&["netns", "add", &name])?;
        // From here on it goes with this value, and its interfaces with it.
        let namespace = Namespace {
            name: name.clone(),
            address: Ipv4Addr::from(network | 2),
        };
        let pair = ["type", "veth", "peer", "name", &inner, "netns", &name];
        ip(&[&["link", "add", &outer][..], &pair].concat())?;
        ip(&["addr", "add", &format!("{near}/30"), "dev", &outer])?;
        ip(&["link", "set", &outer, "up"])?;
        let far = format!("{}/30", namespace.address);
        ip(&["-n", &name, "addr", "add", &far, "dev", &inner])?;
        ip(&["-n", &name, "link", "set", &inner, "up"])?;
        Ok(namespace)
    }

    /// It, as a place for a worker.
    pub fn place(&self) -> WorkerPlace {
        WorkerPlace {
            address: IpAddr::V4(self.address),
            through: [IP, "netns", "exec", &self.name].map(str::to_owned).into(),
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let Output { status, stderr, .. } = Command::new(IP).args(arguments).output()?;
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(
            String::from_utf8_lossy(&stderr).trim().to_owned(),
        )),
    }
}
