//! The few facts of `config.json` and `generation_config.json` that the tool relies on; where a
//! folder has none, those of `genai_config.json`.
//!
//! In: a model's files. Out: a [`Config`], each value checked; a key that is absent is `None`, a
//! key that makes no sense is an error that names it.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, Tree};
use crate::files::{json, read_limited};
use crate::limits;

/// More layers, neurons or tokens than any model has: what a hostile count may ask for.
const MAX_COUNT: u64 = 1 << 24;

/// What a model says about itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Config {
    /// `model_type`: the family, for example `qwen2_vl`.
    pub model_type: String,
    /// Decoder layers: `num_hidden_layers`, at the top or in `text_config` (or what a family calls
    /// them). Some families leave out what equals their default.
    pub num_hidden_layers: Option<usize>,
    /// Width of the residual stream: `hidden_size`.
    pub hidden_size: Option<usize>,
    /// Rows of the output projection: `vocab_size`.
    pub vocab_size: Option<usize>,
    /// The placeholder that image features replace: `image_token_id` or `image_token_index`.
    pub image_token_id: Option<i64>,
    /// Token ids that end an answer, from `generation_config.json`, else from `config.json`.
    pub eos_token_ids: Vec<i64>,
    /// Longest answer, in tokens: `max_new_tokens` of `generation_config.json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    /// Longest prompt and answer together, in tokens: `max_length` of `generation_config.json`, or where
    /// there is none `search.max_length` of `genai_config.json`, unless that is all that the model takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length: Option<usize>,
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
            return match Document::open(tree, super::onnxruntime_genai::MAP)? {
                Some(map) => Config::of_genai(&map).map(Some),
                None => Ok(None),
            };
        };
        let generation = Document::open(tree, "generation_config.json")?;
        let map = match generation {
            Some(_) => None,
            None => Document::open(tree, super::onnxruntime_genai::MAP)?,
        };
        let eos = match generation.as_ref().map(|g| g.ids("eos_token_id")) {
            Some(ids) => ids?,
            None => Vec::new(),
        };
        let limit = |key| match &generation {
            Some(generation) => generation.count(&[key]),
            None => Ok(None),
        };
        let eos_token_ids = match eos.is_empty() {
            true => config.ids("eos_token_id")?,
            false => eos,
        };
        Ok(Some(Config {
            model_type: config.string("model_type")?,
            num_hidden_layers: config.count(&["num_hidden_layers", "n_layer", "num_layers"])?,
            hidden_size: config.count(&["hidden_size", "n_embd", "d_model"])?,
            vocab_size: config.count(&["vocab_size"])?,
            image_token_id: match config.id("image_token_id")? {
                Some(id) => Some(id),
                None => config.id("image_token_index")?,
            },
            eos_token_ids,
            max_new_tokens: limit("max_new_tokens")?,
            max_length: match &map {
                Some(map) => genai_max_length(map)?,
                None => limit("max_length")?,
            },
            vision: config
                .value
                .get("vision_config")
                .is_some_and(Value::is_object),
        }))
    }

    /// The same facts, as onnxruntime-genai's map has them.
    fn of_genai(map: &Document) -> Result<Config, Error> {
        Ok(Config {
            model_type: map.string("model.type")?,
            num_hidden_layers: map.count(&["model.decoder.num_hidden_layers"])?,
            hidden_size: map.count(&["model.decoder.hidden_size"])?,
            vocab_size: map.count(&["model.vocab_size"])?,
            image_token_id: map.id("model.image_token_id")?,
            eos_token_ids: map.ids("model.eos_token_id")?,
            max_new_tokens: None,
            max_length: genai_max_length(map)?,
            vision: map.get("model.vision").is_some_and(Value::is_object),
        })
    }
}

/// `search.max_length` of onnxruntime-genai's map. Its builder writes the model's `context_length` there
/// (`builder.py`, `make_genai_config`): that is no limit that somebody chose.
fn genai_max_length(map: &Document) -> Result<Option<usize>, Error> {
    let context = map.count(&["model.context_length"])?;
    let limit = map.count(&["search.max_length"])?;
    Ok(limit.filter(|&limit| context.is_none_or(|context| limit < context)))
}

/// Where a configuration keeps the language model's own, for models of several parts.
const NESTED: &[&str] = &["text_config", "llm_config", "language_config"];

/// A JSON object and the file it came from.
pub(super) struct Document {
    path: PathBuf,
    value: Value,
}

impl Document {
    /// Reads the file `name`, if it is there.
    ///
    /// # Errors
    /// See [`read_json`]; a file that holds no object.
    pub(super) fn open(tree: &Tree, name: &str) -> Result<Option<Document>, Error> {
        let Some(entry) = tree.get(name) else {
            return Ok(None);
        };
        let path = tree.folder().join(name);
        let value = read_json_tree(&entry.path)?;
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

    /// The object.
    pub(super) fn value(&self) -> &Value {
        &self.value
    }

    /// The value at `key`, with dots from object to object. `null` is absent.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        key.split('.')
            .try_fold(&self.value, |value, part| value.get(part))
            .filter(|value| !value.is_null())
    }

    /// The value of `key`, at the top or in the language model's part, with the key's full name.
    fn find(&self, key: &str) -> Option<(String, &Value)> {
        let top = self.get(key).map(|value| (key.to_owned(), value));
        top.or_else(|| self.find_nested(key))
    }

    fn find_nested(&self, key: &str) -> Option<(String, &Value)> {
        let keys = NESTED.iter().map(|part| format!("{part}.{key}"));
        let mut found = keys.filter_map(|key| Some((self.get(&key)?, key)));
        found.next().map(|(value, key)| (key, value))
    }

    /// A part of a model that is recognized and cannot be worked on.
    pub(super) fn unsupported(
        &self,
        key: &str,
        expected: &'static str,
        found: &'static str,
    ) -> Error {
        Error::Unsupported {
            path: self.path.clone(),
            key: key.to_owned(),
            expected,
            found,
        }
    }

    /// The error of a key that makes no sense.
    pub(super) fn wrong(&self, key: String, expected: &'static str, found: &Value) -> Error {
        Error::Key {
            path: self.path.clone(),
            key,
            expected,
            found: shortened(found),
        }
    }

    fn string(&self, key: &str) -> Result<String, Error> {
        let value = self.get(key).unwrap_or(&Value::Null);
        match value.as_str() {
            Some(text) if !text.is_empty() && text.len() <= 200 => Ok(text.to_owned()),
            _ => Err(self.wrong(key.to_owned(), "a string", value)),
        }
    }

    /// The first of `keys` that is there: that of the language model rather than one at the top.
    pub(super) fn count(&self, keys: &[&str]) -> Result<Option<usize>, Error> {
        let nested = keys.iter().find_map(|key| self.find_nested(key));
        let Some((key, value)) = nested.or_else(|| keys.iter().find_map(|key| self.find(key)))
        else {
            return Ok(None);
        };
        let count = value
            .as_u64()
            .filter(|count| (1..=MAX_COUNT).contains(count))
            .and_then(|count| usize::try_from(count).ok());
        match count {
            Some(count) => Ok(Some(count)),
            None => Err(self.wrong(key, "a count from 1 to 16777216", value)),
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

/// Reads a JSON file of fixed shape, of at most [`limits::JSON_BYTES`].
///
/// # Errors
/// [`Error::Files`], [`Error::Json`].
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = read_limited(path, limits::JSON_BYTES)?;
    json::read_format(&bytes).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}

/// Reads a JSON file of any shape, of at most [`limits::JSON_BYTES`].
///
/// # Errors
/// [`Error::Files`], [`Error::Json`].
pub fn read_json_tree(path: &Path) -> Result<Value, Error> {
    let bytes = read_limited(path, limits::JSON_BYTES)?;
    json::read_tree(&bytes).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })
}
