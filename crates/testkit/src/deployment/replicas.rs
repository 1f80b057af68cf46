//! Several enclaves that serve one deployment, each with a keyset and a credential of its own, and a TLS gateway in
//! front of them.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::program::Launch;
use super::{
    Deployment, DeploymentError, EnclaveFacts, EnclaveSettings, MeasurementFacts, READY, Role,
    START, http_get, quoted, write,
};

/// Where Debian puts it.
const NGINX: &str = "/usr/sbin/nginx";
/// What the documentation tells operators to use; here with other addresses and files.
const GATEWAY: &str = include_str!("../../../../docs/gateways/nginx.conf");

/// A replica before it is started.
#[derive(Clone, Debug)]
pub struct ReplicaFacts {
    /// Its configuration.
    pub config: PathBuf,
    /// Where it will listen.
    pub address: SocketAddr,
    /// Where it will listen for attested TLS.
    pub attested_tls: SocketAddr,
}

/// A running gateway.
#[derive(Clone, Debug)]
pub struct GatewayFacts {
    /// Its base address, https.
    pub url: String,
    /// Where it listens.
    pub address: SocketAddr,
}

/// A certificate authority and the certificate it gave to 127.0.0.1, as PEM files.
#[derive(Clone, Debug)]
pub struct CertificateFacts {
    /// The authority's certificate.
    pub authority: PathBuf,
    /// The server's certificate.
    pub certificate: PathBuf,
    /// The server's private key.
    pub key: PathBuf,
}

impl Deployment {
    /// Writes the configurations of `count` replicas, each of which knows the others as its peers, and measures them.
    /// In the place of `configure_enclave` and `measure_enclave`.
    pub fn configure_replicas(
        &mut self,
        settings: &EnclaveSettings,
        count: usize,
    ) -> Result<Vec<ReplicaFacts>, DeploymentError> {
        let addresses = free_addresses(2 * count)?;
        let (addresses, attested) = addresses.split_at(count);
        let mut toml = String::new();
        for (index, &address) in addresses.iter().enumerate() {
            let peers: Vec<_> = addresses
                .iter()
                .filter(|&&peer| peer != address)
                .map(|peer| quoted(&format!("http://{peer}")))
                .collect();
            let service = format!(
                "listen = \"{address}\"\nattested_tls = \"{}\"\npeers = [{}]",
                attested[index],
                peers.join(", ")
            );
            let base = self.configure_enclave(settings)?;
            let text = super::read(&base)?;
            let config = self.work.join(format!("replica-{index}.toml"));
            write(&config, &text.replace("listen = \"127.0.0.1:0\"", &service))?;
            self.config = Some(config.clone());
            let measured = self.measure_enclave()?.toml;
            toml.push_str(
                &measured.replace("\"casemate-enclave\"", &format!("\"replica-{index}\"")),
            );
            toml.push('\n');
            self.replicas.push(ReplicaFacts {
                config,
                address,
                attested_tls: attested[index],
            });
        }
        let fields = serde_json::Value::Null;
        self.measurement = Some(MeasurementFacts { toml, fields });
        Ok(self.replicas.clone())
    }

    /// The configured replicas.
    pub fn replicas(&self) -> &[ReplicaFacts] {
        &self.replicas
    }

    /// Starts a configured replica and waits until it serves.
    pub fn start_replica(&mut self, index: usize) -> Result<EnclaveFacts, DeploymentError> {
        let replica = self.replicas.get(index);
        let replica = replica.ok_or(DeploymentError::TooEarly("configure_replicas"))?;
        let name = ["replica-0", "replica-1", "replica-2"]
            .get(index)
            .unwrap_or(&"replica");
        let started = Instant::now();
        let launch = self
            .launch(name, "casemate-enclave")
            .option("--config", &replica.config);
        let mut program = launch.serve(&self.logs(), START)?;
        let url = format!("http://{}", program.address());
        program.wait_until("readiness", READY, || {
            http_get(&url, "/readyz").is_ok_and(|reply| reply.status == 200)
        })?;
        let attested_tls = program
            .attested_tls()
            .map(|address| format!("tls://{address}"));
        self.running.push((Role::Replica(index), program));
        Ok(EnclaveFacts {
            url,
            attested_tls,
            took: started.elapsed(),
        })
    }

    /// Makes a certificate authority and a certificate for 127.0.0.1.
    pub fn make_certificate(&self) -> Result<CertificateFacts, DeploymentError> {
        let failed = |error: rcgen::Error| DeploymentError::Io {
            path: self.work.join("gateway.pem"),
            source: io::Error::other(error),
        };
        let (authority, server) = certificates().map_err(failed)?;
        let facts = CertificateFacts {
            authority: self.work.join("gateway-ca.pem"),
            certificate: self.work.join("gateway.pem"),
            key: self.work.join("gateway-key.pem"),
        };
        write(&facts.authority, &authority)?;
        write(&facts.certificate, &server.0)?;
        write(&facts.key, &server.1)?;
        Ok(facts)
    }

    /// Whether this machine has nginx.
    pub fn has_nginx() -> bool {
        Path::new(NGINX).is_file()
    }

    /// Starts nginx, which ends TLS in front of `upstreams`, configured as the documentation says.
    ///
    /// # Panics
    /// When that configuration no longer has the lines that are replaced here.
    pub fn start_nginx(
        &mut self,
        certificate: &CertificateFacts,
        upstreams: &[SocketAddr],
    ) -> Result<GatewayFacts, DeploymentError> {
        let address = free_addresses(1)?[0];
        let directory = self.work.join("nginx");
        fs::create_dir_all(&directory).map_err(|source| DeploymentError::Io {
            path: directory.clone(),
            source,
        })?;
        let servers: Vec<_> = upstreams
            .iter()
            .map(|upstream| format!("server {upstream} max_fails=0;"))
            .collect();
        let documented = "server 10.0.0.5:8090 max_fails=0;\n    \
                          server 10.0.0.6:8090 max_fails=0;";
        let mut site = GATEWAY.to_owned();
        for (from, to) in [
            (documented, servers.join("\n    ")),
            ("listen 443 ssl;", format!("listen {address} ssl;")),
            (
                "/etc/ssl/casemate/fullchain.pem",
                certificate.certificate.display().to_string(),
            ),
            (
                "/etc/ssl/casemate/privkey.pem",
                certificate.key.display().to_string(),
            ),
        ] {
            assert!(
                site.contains(from),
                "docs/gateways/nginx.conf has no {from}"
            );
            site = site.replace(from, &to);
        }
        let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("    {kind}_temp_path {}/{kind};\n", directory.display()))
            .collect();
        let config = directory.join("nginx.conf");
        let text = format!(
            "daemon off;\nmaster_process off;\npid {directory}/nginx.pid;\nerror_log stderr info;\n\
             events {{}}\nhttp {{\n    access_log {directory}/access.log;\n{paths}{site}}}\n",
            directory = directory.display()
        );
        write(&config, &text)?;
        let launch = Launch::new("nginx", NGINX.into())
            .option("-p", &directory)
            .option("-c", &config)
            .option("-e", "stderr");
        let mut program = launch.start(&self.logs())?;
        program.wait_until("its port", START, || {
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })?;
        self.running.push((Role::Gateway, program));
        Ok(GatewayFacts {
            url: format!("https://{address}"),
            address,
        })
    }
}

/// Addresses on loopback that nobody listens on at this moment. What is configured and measured before it starts cannot
/// take a free port itself.
pub fn free_addresses(count: usize) -> Result<Vec<SocketAddr>, DeploymentError> {
    let failed = |source| DeploymentError::Io {
        path: PathBuf::from("127.0.0.1:0"),
        source,
    };
    let bind = || TcpListener::bind("127.0.0.1:0");
    // All at the same time, so that they differ.
    let listeners: io::Result<Vec<_>> = (0..count).map(|_| bind()).collect();
    let listeners = listeners.map_err(failed)?;
    let addresses: io::Result<Vec<_>> = listeners.iter().map(TcpListener::local_addr).collect();
    addresses.map_err(failed)
}

/// PEM of an authority's certificate, and of a certificate for 127.0.0.1 with its key.
fn certificates() -> Result<(String, (String, String)), rcgen::Error> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority_key = KeyPair::generate()?;
    let authority_pem = authority.self_signed(&authority_key)?.pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate()?;
    let server = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let certificate = server.signed_by(&key, &issuer)?;
    Ok((authority_pem, (certificate.pem(), key.serialize_pem())))
}
