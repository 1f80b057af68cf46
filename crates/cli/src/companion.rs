//! Programs that lie beside this one and do what it should not have to link: they get its arguments and take its place.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::exit::Failure;

/// Becomes the program of that name; returns only where that fails. `absent` says what is missed if it is not there.
pub(crate) fn become_program(
    name: &str,
    arguments: &[OsString],
    absent: impl FnOnce(&Path) -> Failure,
) -> Result<(), Failure> {
    let own = std::env::current_exe().map_err(Failure::io)?;
    let program = own.with_file_name(name);
    if !program.is_file() {
        return Err(absent(&program));
    }
    Err(Failure::io(Command::new(program).args(arguments).exec()))
}
