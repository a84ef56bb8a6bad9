//! Seconds, medians, memory, and the machine they belong to.

use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvw::runtime::{Device, Located, locate};

/// Seconds of several runs of one operation.
#[derive(Clone, Default)]
pub(crate) struct Seconds(Vec<f64>);

impl Seconds {
    /// Runs `f` and adds its time.
    pub(crate) fn time<T>(&mut self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = f()?;
        self.add(start.elapsed().as_secs_f64());
        Ok(result)
    }

    pub(crate) fn add(&mut self, seconds: f64) {
        self.0.push(seconds);
        self.0.sort_by(f64::total_cmp);
    }

    pub(crate) fn median(&self) -> f64 {
        match self.0.as_slice() {
            [] => f64::NAN,
            sorted if sorted.len() % 2 == 1 => sorted[sorted.len() / 2],
            sorted => (sorted[sorted.len() / 2 - 1] + sorted[sorted.len() / 2]) / 2.0,
        }
    }
}

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [first, last] = [self.0.first(), self.0.last()].map(|s| s.copied().unwrap_or(f64::NAN));
        write!(
            f,
            "{:7.3} s ({first:.3}–{last:.3}, n = {})",
            self.median(),
            self.0.len()
        )
    }
}

/// One line of a table.
pub(crate) fn line(what: &str, seconds: &Seconds, baseline: &Seconds, note: &str) {
    let ratio = seconds.median() / baseline.median();
    println!("  {what:<46} {seconds}  ratio {ratio:.2}  {note}");
}

pub(crate) fn heading(text: &str) {
    println!("\n{text}");
}

/// Megabytes of `key` (`VmHWM`, `RssAnon`) of the process `pid` (or `self`).
pub(crate) fn memory_mb(pid: &str, key: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0 / 1e6)
}

/// Runs a command to its end. Seconds from start to exit; peak resident memory in megabytes, asked for
/// every few milliseconds (the kernel's high-water mark only grows, so the last answer is the peak).
pub(crate) fn run_and_watch(command: &mut Command) -> Result<(f64, f64)> {
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("{command:?}"))?;
    let pid = child.id().to_string();
    let watcher = std::thread::spawn(move || {
        let mut peak = 0.0;
        while let Some(now) = memory_mb(&pid, "VmHWM") {
            peak = now;
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let status = child.wait()?;
    let seconds = start.elapsed().as_secs_f64();
    succeeded(status).with_context(|| format!("{command:?}"))?;
    let peak = watcher.join().unwrap_or(f64::NAN);
    Ok((seconds, peak))
}

fn succeeded(status: ExitStatus) -> Result<()> {
    anyhow::ensure!(status.success(), "{status}");
    Ok(())
}

/// The ONNX Runtime that the tool itself would take.
pub(crate) fn library() -> Result<Located> {
    let options = locate::Options::from_env(None, Device::Cpu, false)?;
    Ok(kvw::runtime::locate(&options, &|said| eprintln!("{said}"))?)
}

pub(crate) fn describe_machine() -> Result<()> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(':').nth(1))
        .map_or("unknown CPU", str::trim);
    let cores = std::thread::available_parallelism()?;
    let memory: f64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .unwrap_or(f64::NAN);
    let kernel = read("/proc/sys/kernel/osrelease");
    println!(
        "{cores} cores of {model}, {:.0} GB memory, Linux {}",
        memory * 1024.0 / 1e9,
        kernel.trim()
    );
    println!(
        "ONNX Runtime {}, kvw {}; load average {}",
        library()?.version,
        env!("CARGO_PKG_VERSION"),
        read("/proc/loadavg").split(' ').next().unwrap_or("?")
    );
    Ok(())
}
