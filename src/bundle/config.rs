//! The few facts of `config.json` and `generation_config.json` that the tool relies on.
//!
//! In: a model's files. Out: a [`Config`], each value checked; a key that is absent is `None`, a
//! key that makes no sense is an error that names it.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, Tree};

/// The largest JSON file that is read, in bytes. Real configurations take a few kilobytes.
pub const MAX_JSON_BYTES: u64 = 16 << 20;

/// More layers than any model has: what a hostile count may ask for.
const MAX_LAYERS: u64 = 100_000;

/// What a model says about itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Config {
    /// `model_type`: the family, for example `qwen2_vl`.
    pub model_type: String,
    /// Decoder layers: `num_hidden_layers`, at the top or in `text_config`. Some families leave
    /// out what equals their default.
    pub num_hidden_layers: Option<usize>,
    /// The placeholder that image features replace: `image_token_id` or `image_token_index`.
    pub image_token_id: Option<i64>,
    /// Token ids that end an answer, from `generation_config.json`, else from `config.json`.
    pub eos_token_ids: Vec<i64>,
    /// Whether there is a `vision_config`.
    pub vision: bool,
}

impl Config {
    /// Reads the configuration of a model, or `None` where it has none.
    ///
    /// # Errors
    /// A file that is too large, no JSON, or a key with a value that makes no sense.
    pub(super) fn read(tree: &Tree) -> Result<Option<Config>, Error> {
        let Some(config) = Document::open(tree, "config.json")? else {
            return Ok(None);
        };
        let generation = Document::open(tree, "generation_config.json")?;
        let eos = match generation.as_ref().map(|g| g.ids("eos_token_id")) {
            Some(ids) => ids?,
            None => Vec::new(),
        };
        let eos_token_ids = match eos.is_empty() {
            true => config.ids("eos_token_id")?,
            false => eos,
        };
        Ok(Some(Config {
            model_type: config.string("model_type")?,
            num_hidden_layers: config.count("num_hidden_layers")?,
            image_token_id: match config.id("image_token_id")? {
                Some(id) => Some(id),
                None => config.id("image_token_index")?,
            },
            eos_token_ids,
            vision: config
                .value
                .get("vision_config")
                .is_some_and(Value::is_object),
        }))
    }
}

/// A JSON object and the file it came from.
struct Document {
    path: PathBuf,
    value: Value,
}

impl Document {
    fn open(tree: &Tree, name: &str) -> Result<Option<Document>, Error> {
        let Some(entry) = tree.get(name) else {
            return Ok(None);
        };
        let path = tree.folder().join(name);
        let value: Value = read_json(&entry.path)?;
        if !value.is_object() {
            return Err(Error::Key {
                path,
                key: ".".to_owned(),
                expected: "an object",
                found: shortened(&value),
            });
        }
        Ok(Some(Document { path, value }))
    }

    /// The value of `key`, at the top or in `text_config`, with the key's full name. `null` is absent.
    fn find(&self, key: &str) -> Option<(String, &Value)> {
        let top = self.value.get(key).map(|value| (key.to_owned(), value));
        let nested = || {
            let value = self.value.get("text_config")?.get(key)?;
            Some((format!("text_config.{key}"), value))
        };
        top.filter(|(_, value)| !value.is_null())
            .or_else(nested)
            .filter(|(_, value)| !value.is_null())
    }

    fn wrong(&self, key: String, expected: &'static str, found: &Value) -> Error {
        Error::Key {
            path: self.path.clone(),
            key,
            expected,
            found: shortened(found),
        }
    }

    fn string(&self, key: &str) -> Result<String, Error> {
        let value = self.value.get(key).unwrap_or(&Value::Null);
        match value.as_str() {
            Some(text) if !text.is_empty() && text.len() <= 200 => Ok(text.to_owned()),
            _ => Err(self.wrong(key.to_owned(), "a string", value)),
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>, Error> {
        let Some((key, value)) = self.find(key) else {
            return Ok(None);
        };
        let count = value
            .as_u64()
            .filter(|count| (1..=MAX_LAYERS).contains(count))
            .and_then(|count| usize::try_from(count).ok());
        match count {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(key, "a count from 1 to 100000", value)),
        }
    }

    fn id(&self, key: &str) -> Result<Option<i64>, Error> {
        let Some((key, value)) = self.find(key) else {
            return Ok(None);
        };
        match token_id(value) {
            Some(id) => Ok(Some(id)),
            None => Err(self.wrong(key, "a token id", value)),
        }
    }

    fn ids(&self, key: &str) -> Result<Vec<i64>, Error> {
        let Some((key, value)) = self.find(key) else {
            return Ok(Vec::new());
        };
        let ids = match value {
            Value::Array(values) => values.iter().map(token_id).collect(),
            value => token_id(value).map(|id| vec![id]),
        };
        ids.ok_or_else(|| self.wrong(key, "a token id or a list of them", value))
    }
}

fn token_id(value: &Value) -> Option<i64> {
    value
        .as_i64()
        .filter(|id| (0..=i64::from(i32::MAX)).contains(id))
}

fn shortened(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        value => value.to_string().chars().take(80).collect(),
    }
}

/// Reads a JSON file of at most [`MAX_JSON_BYTES`].
///
/// # Errors
/// [`Error::Files`], [`Error::TooLarge`], [`Error::Json`].
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let (file, metadata) = crate::files::copy::open_regular(path)?;
    let too_large = |found| Error::TooLarge {
        path: path.to_owned(),
        limit: MAX_JSON_BYTES,
        found,
    };
    if metadata.len() > MAX_JSON_BYTES {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    // The file may grow while it is read.
    file.take(MAX_JSON_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(crate::files::Error::io("read", path))?;
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    if len > MAX_JSON_BYTES {
        return Err(too_large(len));
    }
    serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}
