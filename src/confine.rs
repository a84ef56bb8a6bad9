//! Somebody else's file, read by a child process that has little memory and time.
//!
//! In: an open file, the name of a reader, a [`Budget`]. Out: the items that the reader makes of the file,
//! one by one, or a [`Fault`]. Promised: whatever the file makes a library do (panic, abort, run out of
//! memory, run for ever, overwrite its own memory), this process gets a fault and goes on.
//!
//! Who is confined, and why: `parquet` (65 panics in 60,000 damaged files, zstd in C, pages that unpack to
//! gigabytes); `tokenizers` (panics, lists in `tokenizer.json` that take many times their size, normalizers that
//! multiply a text); `minijinja` (it counts steps, and lists added to themselves take few). Of the last two, a first
//! run with a text like those of a data set is confined; what passes is used in this process. Who is not:
//! `image`, whose sizes are checked in the header before anything is decoded; `prost` and `serde_json`, which are
//! preceded by a scan that allocates nothing.
//!
//! The child is this program again ([`enable`] says so: a library does not know whether its program is
//! `kvw`). It gets the file as its standard input, no arguments but the reader's name and the budget, no
//! environment, and limits itself before it reads: address space, processor time (not time on the clock: a
//! busy machine is no fault of the file), no new files, no core dump. It starts in about 3 ms. Without [`enable`] readers run in this process, and only panics
//! are contained.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The first argument of a child.
pub const ARGUMENT: &str = "__confined";

/// What a child may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Address space beyond what the program itself needs, in bytes.
    pub memory: u64,
    /// Processor time, in seconds.
    pub seconds: u64,
}

/// A reader: takes the file, gives its items to the sink.
pub type Reader = fn(File, Sink<'_>) -> Result<(), String>;

/// Where a reader puts its items. An error: nobody wants more.
pub type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), String>;

/// Why there are no more items.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The reader says what is wrong with the file.
    #[error("{0}")]
    Refused(String),
    /// The library panicked.
    #[error("the library that reads it panicked: {0}")]
    Panic(String),
    /// More memory than the budget, or a stack that overflowed, or worse.
    #[error("reading it takes more than {0} bytes of memory, or crashes its reader")]
    Memory(u64),
    /// More time than the budget.
    #[error("reading it takes more than {0} seconds of processor time")]
    Time(u64),
    /// The reader ended as no reader should.
    #[error("its reader ended with {0}")]
    Died(ExitStatus),
    /// No child could be started, or spoken to.
    #[error("no process could be started to read it: {0}")]
    Io(#[from] std::io::Error),
}

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// From now on, readers run in children of `program`: it calls [`serve`] when its first argument is
/// [`ARGUMENT`].
pub fn enable(program: PathBuf) {
    let _ = PROGRAM.set(program);
}

/// Whether readers run in children.
pub fn is_enabled() -> bool {
    PROGRAM.get().is_some()
}

/// Runs the reader `name` on `file`, in a child if there can be one, and gives what it makes to `each`.
///
/// # Errors
/// [`Fault`]. What `each` returns as an error ends the reading, as [`Fault::Refused`].
pub fn read(
    name: &str,
    reader: Reader,
    file: File,
    budget: Budget,
    each: Sink<'_>,
) -> Result<(), Fault> {
    match PROGRAM.get() {
        Some(program) => {
            let mut command = Command::new(program);
            command.args([
                ARGUMENT,
                name,
                &budget.memory.to_string(),
                &budget.seconds.to_string(),
            ]);
            in_child(command, file, budget, each)
        }
        None => match contained(|| reader(file, each)) {
            Ok(result) => result.map_err(Fault::Refused),
            Err(panic) => Err(Fault::Panic(panic)),
        },
    }
}

/// What a panic in `call` said.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        let text = payload
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| payload.downcast_ref::<&str>().copied());
        text.unwrap_or("no message").to_owned()
    })
}

/// What stands before each message of a child: its kind, then its length as 4 bytes.
const ITEM: u8 = b'i';
const REFUSED: u8 = b'r';
const PANIC: u8 = b'p';
const END: u8 = b'e';

fn in_child(mut command: Command, file: File, budget: Budget, each: Sink<'_>) -> Result<(), Fault> {
    let mut child = command
        .env_clear()
        .current_dir("/")
        .stdin(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let heard = match child.stdout.take() {
        Some(pipe) => listen(&mut BufReader::with_capacity(1 << 16, pipe), budget, each),
        None => Ok(None),
    };
    if heard.is_err() {
        // It may still have much to say, and nobody listens.
        let _ = child.kill();
    }
    let status = child.wait()?;
    match heard? {
        Some(()) => Ok(()),
        None => Err(match status.signal() {
            // Rust aborts where memory cannot be had; C libraries crash.
            Some(6 | 11) => Fault::Memory(budget.memory),
            Some(9 | 24) => Fault::Time(budget.seconds),
            _ => Fault::Died(status),
        }),
    }
}

/// Reads messages. `None`: they stop before the end.
fn listen(pipe: &mut dyn Read, budget: Budget, each: Sink<'_>) -> Result<Option<()>, Fault> {
    let mut message = Vec::new();
    loop {
        let mut head = [0; 5];
        if let Err(error) = pipe.read_exact(&mut head) {
            return match error.kind() {
                std::io::ErrorKind::UnexpectedEof => Ok(None),
                _ => Err(error.into()),
            };
        }
        let [kind, length @ ..] = head;
        let length = u64::from(u32::from_le_bytes(length));
        if length > budget.memory {
            return Err(Fault::Memory(budget.memory));
        }
        message.clear();
        let read = pipe.take(length).read_to_end(&mut message)?;
        if u64::try_from(read).ok() != Some(length) {
            return Ok(None);
        }
        let text = || String::from_utf8_lossy(&message).into_owned();
        match kind {
            ITEM => each(&message).map_err(Fault::Refused)?,
            REFUSED => return Err(Fault::Refused(text())),
            PANIC => return Err(Fault::Panic(text())),
            END => return Ok(Some(())),
            other => return Err(Fault::Refused(format!("a message of kind {other}"))),
        }
    }
}

/// Whether the program's arguments are those of a child; then its reader's name and budget.
pub fn asked(arguments: &[String]) -> Option<(&str, Budget)> {
    match arguments {
        [_, argument, name, memory, seconds] if argument == ARGUMENT => Some((
            name,
            Budget {
                memory: memory.parse().ok()?,
                seconds: seconds.parse().ok()?,
            },
        )),
        _ => None,
    }
}

/// The child: limits itself, reads its standard input, writes messages to its standard output.
///
/// # Errors
/// The limits cannot be set, or nobody reads what is written.
pub fn serve(reader: Reader, budget: Budget) -> std::io::Result<()> {
    limit(budget)?;
    // The panic's message is sent; nobody reads the standard error.
    std::panic::set_hook(Box::new(|_| {}));
    let file = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let mut broken = None;
    let ended = contained(|| {
        reader(file, &mut |item| {
            send(&mut out, ITEM, item).map_err(|error| {
                let text = error.to_string();
                broken = Some(error);
                text
            })
        })
    });
    if let Some(error) = broken {
        return Err(error);
    }
    match ended {
        Ok(Ok(())) => send(&mut out, END, b"")?,
        Ok(Err(refusal)) => send(&mut out, REFUSED, refusal.as_bytes())?,
        Err(panic) => send(&mut out, PANIC, panic.as_bytes())?,
    }
    out.flush()
}

fn send(out: &mut impl Write, kind: u8, message: &[u8]) -> std::io::Result<()> {
    let length = u32::try_from(message.len())
        .map_err(|_| std::io::Error::other("an item of more than 4 GiB"))?;
    out.write_all(&[kind])?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(message)
}

fn limit(budget: Budget) -> std::io::Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let program = status.lines().find_map(|line| {
        let kilobytes = line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB")?;
        kilobytes.parse::<u64>().ok()?.checked_mul(1 << 10)
    });
    let program = program.unwrap_or(0);
    for (resource, most) in [
        (Resource::As, program.saturating_add(budget.memory)),
        (Resource::Cpu, budget.seconds),
        (Resource::Fsize, 0),
        (Resource::Core, 0),
    ] {
        // Never above what whoever started us allows.
        let now = getrlimit(resource);
        let most = [now.current, now.maximum]
            .into_iter()
            .flatten()
            .fold(most, u64::min);
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit)?;
    }
    Ok(())
}
