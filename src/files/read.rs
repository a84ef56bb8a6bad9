//! Files read as a whole.
//!
//! In: a path that a user or a file named, and a limit. Out: the bytes. Promised: nothing but a regular
//! file is read, so neither a pipe nor a device makes the reader wait or run full; and never more than
//! the limit is held, whatever the file's length was when it was asked.

use std::io::Read as _;
use std::path::Path;

use super::Error;
use super::copy::open_regular;

/// The bytes of the regular file `path`, links followed.
///
/// # Errors
/// [`Error::NotRegular`], [`Error::TooLarge`] for more than `limit` bytes, [`Error::Io`].
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let (file, metadata) = open_regular(path)?;
    let too_large = |found| Error::TooLarge {
        path: path.to_owned(),
        limit,
        found,
    };
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
    // It may grow while it is read.
    file.take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(Error::io("read", path))?;
    let found = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    match found > limit {
        true => Err(too_large(found)),
        false => Ok(bytes),
    }
}

/// The text of the regular file `path`, which must be UTF-8.
///
/// # Errors
/// Those of [`read_limited`]; [`Error::NotText`] with the first byte that is not UTF-8.
pub fn read_text(path: &Path, limit: u64) -> Result<String, Error> {
    String::from_utf8(read_limited(path, limit)?).map_err(|error| Error::NotText {
        path: path.to_owned(),
        offset: error.utf8_error().valid_up_to(),
    })
}
