//! `cargo xtask test --only neon`: the kernels' tests as aarch64 programs, run by an emulator on an x86-64 machine.
//!
//! Compiler, linker and emulator are Debian's, unpacked into the cache by package name: nothing is installed, so no root
//! is needed. rustup cannot always fetch a standard library for another machine; Debian has one that fits its own
//! compiler, which is another release of Rust than the one the rest is built with. So warnings are not denied here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{fetch, process, workspace};

/// What `--only` calls these tests.
pub(crate) const NAME: &str = "neon";

const TRIPLE: &str = "aarch64-unknown-linux-gnu";

/// Debian packages for this machine. What they depend on and the machine lacks comes along: about 150 MB.
const PACKAGES: &[&str] = &[
    "rustc-web",
    "libstd-rust-web-dev",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "qemu-user",
];

/// The standard library for aarch64, without what it depends on there: 34 MB.
const STANDARD_LIBRARY: &str = "libstd-rust-web-dev:arm64";

/// Test programs of the kernels that compute. That of hardening asks the system what it did, and an emulator's answers are
/// its own.
const PROGRAMS: &[&str] = &[
    "attention",
    "bf16",
    "elementwise",
    "gemm",
    "panels",
    "q4",
    "q8",
    "rotate",
];

/// A processor that the emulator plays, and the instruction set that must be found on it.
struct Processor {
    cpu: &'static str,
    isa: &'static str,
}

/// Has the dot product and nothing newer that kernels could come to use by mistake.
const WITH_DOT_PRODUCT: Processor = Processor {
    cpu: "neoverse-n1",
    isa: "neon-dotprod",
};

const WITHOUT: Processor = Processor {
    cpu: "cortex-a72",
    isa: "scalar",
};

/// Unpacked packages.
pub(crate) struct Toolchain {
    root: PathBuf,
}

impl Toolchain {
    /// The one in the cache, fetched at the first time.
    pub(crate) fn obtain() -> Result<Toolchain> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            bail!("they run as they are on aarch64, and emulated on x86-64 Linux alone");
        }
        let cache = fetch::cache();
        let root = cache.join("aarch64");
        let wanted = format!("{}\n{STANDARD_LIBRARY}\n", PACKAGES.join("\n"));
        if fs::read_to_string(root.join("packages")).is_ok_and(|have| have == wanted) {
            return Ok(Toolchain { root });
        }
        let work = cache.join(format!("fetch-aarch64-{}", std::process::id()));
        fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
        let result = unpack(&work)
            .context(
                "a compiler and an emulator for aarch64 come from Debian's packages, which this machine cannot fetch",
            )
            .and_then(|found| {
                fs::write(found.join("packages"), &wanted)?;
                // Of other packages, or left by an interrupted removal.
                if root.exists() {
                    fs::remove_dir_all(&root)?;
                }
                fs::rename(&found, &root).context("cannot move the fetched packages into the cache")
            });
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
        result.map(|()| Toolchain { root })
    }

    /// The commands that test.
    pub(crate) fn tests(&self) -> Vec<Command> {
        let mut all = self.cargo_test(&WITH_DOT_PRODUCT);
        for program in PROGRAMS {
            all.args(["--test", program]);
        }
        all.args(["--", "--show-output"]);
        // It compares with `/proc/self/smaps`, which is the emulator's; see `PROGRAMS`.
        all.args(["--skip", "the_kernel_agrees_with_what_a_region_was_granted"]);
        let mut detection = self.cargo_test(&WITHOUT);
        detection.args(["--", "--show-output", "cpu::"]);
        vec![all, detection]
    }

    /// `cargo test` of the library's own tests.
    fn cargo_test(&self, processor: &Processor) -> Command {
        let mut cargo = process::cargo();
        let target = std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| workspace().join("target"), PathBuf::from);
        // A JSON string is a TOML string.
        let emulator = serde_json::json!([self.tool("qemu-aarch64")]);
        cargo
            .args(["test", "--locked", "--no-fail-fast", "--target", TRIPLE])
            .args(["--package", "casemate-kernels", "--lib"])
            .arg("--config")
            .arg(format!("target.{TRIPLE}.runner={emulator}"))
            // Kernels are compiled as they are elsewhere; what their tests use need not be fast.
            .args(["--config", "profile.dev.package.\"*\".opt-level=0"])
            .env("CARGO_TARGET_DIR", target.join("neon"))
            .env("RUSTC", self.tool("rustc"))
            .env("LD_LIBRARY_PATH", self.libraries())
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER",
                self.tool("aarch64-linux-gnu-gcc"),
            )
            // Then the emulator needs no libraries for aarch64.
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
                "-Ctarget-feature=+crt-static",
            )
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env("QEMU_CPU", processor.cpu)
            .env("CASEMATE_EMULATED", processor.isa);
        cargo
    }

    /// A program of the packages; the machine's own where it had the package already.
    fn tool(&self, name: &str) -> PathBuf {
        let unpacked = self.root.join("usr/bin").join(name);
        if unpacked.exists() {
            unpacked
        } else {
            PathBuf::from(name)
        }
    }

    fn libraries(&self) -> PathBuf {
        self.root.join("usr/lib/x86_64-linux-gnu")
    }
}

/// Fetches and unpacks; returns the folder, below `work`.
fn unpack(work: &Path) -> Result<PathBuf> {
    for folder in ["state/lists/partial", "cache/archives/partial", "root"] {
        fs::create_dir_all(work.join(folder))?;
    }
    process::run(apt(work).args(["update", "-qq"]))?;
    process::run(
        apt(work)
            .args(["install", "--download-only", "--reinstall", "--yes", "-qq"])
            .arg("--no-install-recommends")
            .args(PACKAGES),
    )?;
    let archives = work.join("cache/archives");
    process::run(
        apt(work)
            .current_dir(&archives)
            .args(["download", "-qq", STANDARD_LIBRARY]),
    )?;
    let root = work.join("root");
    for entry in fs::read_dir(&archives)? {
        let package = entry?.path();
        if package.extension().is_some_and(|e| e == "deb") {
            process::run_quiet(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
        }
    }
    // Emulators of other processors are half of what was unpacked.
    for entry in fs::read_dir(root.join("usr/bin"))? {
        let program = entry?.path();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("qemu-") && name != "qemu-aarch64" {
            fs::remove_file(&program)?;
        }
    }
    Ok(root)
}

/// `apt-get` for two architectures, with lists and archives of its own, so that neither root nor a change of the machine is
/// needed. Where packages come from, and whose signature they carry, is as the machine is configured.
fn apt(work: &Path) -> Command {
    let mut apt = Command::new("apt-get");
    let mut option = |name: &str, value: &std::ffi::OsStr| {
        let mut option = std::ffi::OsString::from(format!("{name}="));
        option.push(value);
        apt.arg("-o").arg(option);
    };
    option("Dir::State", work.join("state").as_os_str());
    option("Dir::State::status", "/var/lib/dpkg/status".as_ref());
    option("Dir::Cache", work.join("cache").as_os_str());
    for (name, value) in [
        ("APT::Architectures::", "amd64"),
        ("APT::Architectures::", "arm64"),
        ("Acquire::Languages", "none"),
        (
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
            "false",
        ),
        // Nobody else uses these folders, and the user that apt would become may not write to them.
        ("Debug::NoLocking", "true"),
        ("APT::Sandbox::User", "root"),
    ] {
        option(name, value.as_ref());
    }
    apt
}
