//! The one place for digests.
//!
//! In: bytes, readers or files of any size. Out: sha256, with memory that does not depend on
//! the size.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::Error;

/// A sha256 digest. Prints, parses and serializes as 64 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Sha256([u8; 32]);

impl Sha256 {
    /// The digest of bytes in memory.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Sha256(sha2::Sha256::digest(bytes).into())
    }

    /// The digest of everything that `reader` still gives, read in blocks of 1 MiB.
    ///
    /// # Errors
    /// What the reader reports.
    pub fn of_reader(reader: &mut dyn Read) -> std::io::Result<Self> {
        let mut hasher = sha2::Sha256::new();
        let mut block = vec![0; 1 << 20];
        loop {
            match reader.read(&mut block) {
                Ok(0) => return Ok(Sha256(hasher.finalize().into())),
                Ok(n) => hasher.update(block.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The digest of a regular file.
    ///
    /// # Errors
    /// [`Error::NotRegular`] for anything but a regular file (links are followed), [`Error::Io`].
    pub fn of_file(path: &Path) -> Result<Self, Error> {
        let (mut file, _) = super::copy::open_regular(path)?;
        Self::of_reader(&mut file).map_err(Error::io("read", path))
    }

    /// The digests of many files, in their order, several at a time.
    ///
    /// # Errors
    /// That of the first file that cannot be read.
    pub fn of_files<P: AsRef<Path> + Sync>(paths: &[P]) -> Result<Vec<Self>, Error> {
        paths
            .par_iter()
            .map(|path| Self::of_file(path.as_ref()))
            .collect()
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for Sha256 {
    fn from(bytes: [u8; 32]) -> Self {
        Sha256(bytes)
    }
}

/// A sha256 digest in the making, of bytes that come piece by piece.
#[derive(Clone, Default)]
pub struct Sha256Hasher(sha2::Sha256);

impl Sha256Hasher {
    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes so far.
    pub fn finish(self) -> Sha256 {
        Sha256(self.0.finalize().into())
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256 {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadDigest {
            found: text.chars().take(80).collect(),
        };
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Sha256(digest))
    }
}

impl From<Sha256> for String {
    fn from(digest: Sha256) -> String {
        digest.to_string()
    }
}

impl TryFrom<String> for Sha256 {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 180-2, appendix B.1.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_digest_is_the_standards_and_survives_text_and_json() {
        let digest = Sha256::of_bytes(b"abc");
        assert_eq!(digest.to_string(), ABC);
        assert_eq!(ABC.parse::<Sha256>().unwrap(), digest);
        assert_eq!(ABC.to_uppercase().parse::<Sha256>().unwrap(), digest);
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(json, format!("\"{ABC}\""));
        assert_eq!(serde_json::from_str::<Sha256>(&json).unwrap(), digest);
    }

    #[test]
    fn a_reader_and_a_file_longer_than_one_block_hash_like_the_bytes() {
        let bytes: Vec<u8> = (0..3_000_001u32).map(|i| i.to_le_bytes()[0]).collect();
        assert_eq!(
            Sha256::of_reader(&mut bytes.as_slice()).unwrap(),
            Sha256::of_bytes(&bytes)
        );
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, &bytes).unwrap();
        std::fs::write(&b, b"abc").unwrap();
        let digests = Sha256::of_files(&[a, b]).unwrap();
        assert_eq!(digests, [Sha256::of_bytes(&bytes), ABC.parse().unwrap()]);
    }

    #[test]
    fn what_is_not_64_hexadecimal_digits_is_refused() {
        let long = "é".repeat(32);
        for text in [
            "",
            "abc",
            &ABC[1..],
            &format!("{ABC}0"),
            &ABC.replace('b', "g"),
            &long,
        ] {
            assert!(
                matches!(text.parse::<Sha256>(), Err(Error::BadDigest { .. })),
                "{text}"
            );
        }
    }
}
