//! The `holdfast` command.

use std::process::ExitCode;

/// Much is allocated by one thread and freed by another: each entry, and all that sled writes. glibc's allocator has them wait for each
/// other's locks and keeps twice the memory (`src/docs/performance.md`).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    holdfast::cli::main()
}
