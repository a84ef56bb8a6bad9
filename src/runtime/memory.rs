//! How much memory this machine has, and how much of it this process holds.
//!
//! In: Linux' `/proc`. Out: bytes, or nothing where the system does not say.

use std::fs::read_to_string;

/// Memory that programs may still take without swapping, in bytes.
pub fn available() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

/// Memory of the whole machine, in bytes.
pub fn total() -> Option<u64> {
    field("/proc/meminfo", "MemTotal:")
}

/// Private memory of this process, in bytes: what mapped files take is not counted.
pub fn private() -> Option<u64> {
    field("/proc/self/status", "RssAnon:")
}

fn field(file: &str, name: &str) -> Option<u64> {
    let text = read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_process_holds_less_than_the_machine_has() {
        let (private, total) = (super::private().unwrap(), super::total().unwrap());
        assert!(0 < private && private < total);
        assert!(super::available().unwrap() < total);
    }
}
