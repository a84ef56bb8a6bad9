//! Memory maps: the one place that needs `unsafe` to read a file.

use std::io;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

/// Maps a whole file read-only. An empty file gives empty bytes.
///
/// The bytes are shared, not copied: a clone or a slice of the result keeps the map alive.
///
/// # Errors
/// The file cannot be opened, or is no regular file.
pub fn map_file(path: &Path) -> io::Result<Bytes> {
    let (file, metadata) = super::copy::open_regular(path).map_err(|error| match error {
        super::Error::Io { source, .. } => source,
        super::Error::NotRegular { found, .. } => io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("expected a regular file, found {found}"),
        ),
        other => io::Error::other(other),
    })?;
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: the map is read-only and private to this process; nothing here writes through it or
    // hands out a mutable view. What the type system cannot promise is that no *other* process
    // truncates the file meanwhile (a read past the new end raises SIGBUS) or changes its bytes
    // (a read may see either value). The formats parsed from maps hold no invariant that relies on
    // two reads agreeing: each is decoded once, into owned values, with every range checked against
    // the map's length. Every tool that maps weights shares this limit; `docs/architecture.md`
    // states it.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file)? };
    Ok(Bytes::from_owner(map))
}
