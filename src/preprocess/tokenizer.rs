//! Text ↔ token ids, by `tokenizer.json`. Out: ids with the byte range of the text that each
//! covers.
//!
//! The `tokenizers` library can panic on hostile files (huggingface/tokenizers #2094, #2198): its
//! calls are contained.

#![warn(clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read as _;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use super::Error;
use crate::confine::{self, Budget, Fault};
use crate::files::copy::open_regular;
use crate::files::read_limited;
use crate::limits;

/// A loaded `tokenizer.json`, without truncation or padding.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

/// A tokenized text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// `[T]`.
    pub ids: Vec<i64>,
    /// `[T]`: the bytes of the text (before any normalization) that each token covers. Tokens may
    /// share bytes: a character split over several tokens is covered by each of them. Tokens that
    /// stand for no text are empty.
    pub offsets: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Files`], [`Error::TokenizerLoad`], or [`Error::Panic`] where
    /// the library panicked.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let bytes = read_limited(path, limits::TOKENIZER_BYTES)?;
        confined(path, bytes.len())?;
        let mut inner =
            contained(path, || tokenizers::Tokenizer::from_bytes(&bytes))?.map_err(|source| {
                Error::TokenizerLoad {
                    path: path.to_path_buf(),
                    source,
                }
            })?;
        // transformers ignores what the file says about both, unless the caller asks for them.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|source| Error::TokenizerLoad {
                path: path.to_path_buf(),
                source,
            })?;
        Ok(Self {
            path: path.to_path_buf(),
            inner,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokenizes a text. With `add_special_tokens`, the post-processor adds its own, as transformers
    /// lets it by default.
    ///
    /// # Errors
    /// [`Error::Tokenize`], [`Error::Panic`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded, Error> {
        let encoding = contained(&self.path, || self.inner.encode(text, add_special_tokens))?
            .map_err(|source| Error::Tokenize {
                path: self.path.clone(),
                source,
            })?;
        let ids = encoding.get_ids();
        // A post-processor names ids of its own, and nothing has compared them with the vocabulary.
        if let Some(unknown) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(Error::Tokenize {
                path: self.path.clone(),
                source: format!("expected ids of its vocabulary, found {unknown}").into(),
            });
        }
        Ok(Encoded {
            ids: ids.iter().map(|&id| i64::from(id)).collect(),
            offsets: encoding
                .get_offsets()
                .iter()
                .map(|&(start, end)| start..end)
                .collect(),
        })
    }

    /// The text of token ids.
    ///
    /// # Errors
    /// [`Error::Tokenize`] (also for an id outside `u32`), [`Error::Panic`].
    pub fn decode(&self, ids: &[i64], skip_special_tokens: bool) -> Result<String, Error> {
        let failed = |source| Error::Tokenize {
            path: self.path.clone(),
            source,
        };
        let ids: Vec<u32> = ids
            .iter()
            .map(|&id| u32::try_from(id))
            .collect::<Result<_, _>>()
            .map_err(|error| failed(Box::new(error)))?;
        contained(&self.path, || self.inner.decode(&ids, skip_special_tokens))?.map_err(failed)
    }

    /// The id of a token, where the vocabulary has it.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// The token of an id, where the vocabulary has it.
    #[must_use]
    pub fn id_to_token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }
}

/// Loads the file in a child process first: what it cannot load within the budget is not loaded here.
fn confined(path: &Path, bytes: usize) -> Result<(), Error> {
    if !confine::is_enabled() {
        return Ok(());
    }
    let (file, _) = open_regular(path)?;
    let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
    let budget = Budget {
        memory: limits::TOKENIZER_MEMORY
            .saturating_add(bytes.saturating_mul(TOKENIZER_AMPLIFICATION)),
        seconds: limits::CONFINED_SECONDS,
    };
    let loaded = confine::read(TOKENIZER, load, file, budget, &mut |_| Ok(()));
    loaded.map_err(|fault| match fault {
        Fault::Panic(message) => Error::Panic {
            path: path.to_path_buf(),
            library: "tokenizers",
            message,
        },
        fault => Error::TokenizerLoad {
            path: path.to_path_buf(),
            source: Box::new(fault),
        },
    })
}

/// The name of [`load`] among the confined readers.
pub(crate) const TOKENIZER: &str = "tokenizer";

/// Bytes of memory that a byte of `tokenizer.json` may become while it is loaded.
const TOKENIZER_AMPLIFICATION: u64 = 32;

/// The confined part: loads a `tokenizer.json` and tokenizes a text as those of a data set are (normalizers can
/// multiply it); gives nothing.
pub(crate) fn load(mut file: File, _: confine::Sink<'_>) -> Result<(), String> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    let tokenizer = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| error.to_string())?;
    let text = "What is in the picture? <|user|>\nA garden, 2 people; \u{e9}\u{1f600}. ".repeat(16);
    // Whether it can tokenize is found out later.
    let _ = tokenizer.encode(text, true);
    Ok(())
}

fn contained<T>(path: &Path, call: impl FnOnce() -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| Error::Panic {
        path: path.to_path_buf(),
        library: "tokenizers",
        message: panic_message(payload.as_ref()),
    })
}

/// What a caught panic said.
pub(crate) fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn open(bytes: &[u8]) -> Result<Tokenizer, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, bytes).unwrap();
        Tokenizer::open(&path)
    }

    #[test]
    fn garbage_is_an_error_that_names_the_file() {
        for bytes in [
            &b""[..],
            b"\xff\xfe",
            b"null",
            b"{}",
            b"[1, 2]",
            br#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": [["a", "b"]]}}"#,
            br#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": ["x"]}}"#,
        ] {
            let error = open(bytes).unwrap_err();
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
        }
    }

    #[test]
    fn an_id_that_the_vocabulary_does_not_have_is_an_error_that_names_the_file() {
        let tokenizer = open(
            br#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
                 "post_processor": {"type": "BertProcessing", "sep": ["x", 99], "cls": ["y", 99]}}"#,
        )
        .unwrap();
        assert_eq!(tokenizer.encode("a", false).unwrap().ids, [0]);
        let error = tokenizer.encode("a", true).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(source, "expected ids of its vocabulary, found 99");
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let error =
            contained(Path::new("tokenizer.json"), || panic!("bad merge {}", 3)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tokenizer.json: the tokenizers library panicked: bad merge 3"
        );
    }
}
