//! A model folder's JSON files, read with limits. In: a path. Out: typed fields; errors name the
//! file and the field.

#![warn(clippy::indexing_slicing)]

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, ImageBackend, genai};
use crate::files::{json, read_limited};
use crate::limits;

/// A model folder, with its `config.json` read.
#[derive(Debug)]
pub struct ModelDir {
    dir: PathBuf,
    config: Json,
    backend: Option<ImageBackend>,
}

impl ModelDir {
    /// Reads `config.json`; in a folder of onnxruntime-genai, which has none, the same facts of its
    /// own configuration.
    ///
    /// # Errors
    /// [`Error::Files`], [`Error::Json`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let map = dir.join(genai::MAP);
        let config = match dir.join("config.json") {
            config if config.exists() || !map.exists() => Json::read(&config)?,
            _ => Json::read(&map)?.translated(genai::config),
        };
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            backend: None,
        })
    }

    /// With this image arithmetic instead of the one that `AutoProcessor` would pick.
    #[must_use]
    pub fn with_backend(self, backend: ImageBackend) -> Self {
        Self {
            backend: Some(backend),
            ..self
        }
    }

    /// The image arithmetic that was chosen, where one was.
    pub(crate) fn chosen_backend(&self) -> Option<ImageBackend> {
        self.backend
    }

    /// The image arithmetic for these settings of the image processor. Where none was chosen, as
    /// `AutoImageProcessor` of transformers 4.57 picks the class: the fast one if the settings were
    /// saved by it (`…ImageProcessorFast`), and always for `Qwen2VLImageProcessor`; else the slow one.
    pub(crate) fn backend(&self, image_processor: &Json) -> ImageBackend {
        let class = image_processor.get("image_processor_type");
        let class = class.and_then(Value::as_str).unwrap_or_default();
        self.backend.unwrap_or({
            if class.ends_with("Fast") || class == "Qwen2VLImageProcessor" {
                ImageBackend::Torchvision
            } else {
                ImageBackend::Pillow
            }
        })
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn config(&self) -> &Json {
        &self.config
    }

    pub(crate) fn json(&self, name: &str) -> Result<Json, Error> {
        Json::read(&self.dir.join(name))
    }

    /// `None` where the file does not exist.
    pub(crate) fn optional_json(&self, name: &str) -> Result<Option<Json>, Error> {
        if self.dir.join(name).exists() {
            self.json(name).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Where `field` is set: in `processor_config.json`, else in `config.json`, where folders have it that
    /// are older than processors with settings of their own.
    pub(crate) fn setting(&self, field: &str) -> Result<Json, Error> {
        let processor = self.optional_json("processor_config.json")?;
        let set = |json: &Json| json.get(field).is_some_and(|value| !value.is_null());
        Ok(processor.filter(set).unwrap_or_else(|| self.config.clone()))
    }

    /// The image processor's settings: `preprocessor_config.json`, or, as transformers 5 writes
    /// them, `processor_config.json`'s `image_processor`, or, as onnxruntime-genai has them, that
    /// file's list of transforms.
    pub(crate) fn image_processor(&self) -> Result<Json, Error> {
        match self.optional_json("processor_config.json")? {
            Some(processor) if !self.dir.join("preprocessor_config.json").exists() => {
                match processor.get("image_processor") {
                    Some(settings) => Ok(Json {
                        path: processor.path.clone(),
                        value: settings.clone(),
                    }),
                    None => match genai::image_processor(&processor.value) {
                        Some(value) => Ok(Json {
                            path: processor.path,
                            value,
                        }),
                        None => self.json("preprocessor_config.json"),
                    },
                }
            }
            _ => self.json("preprocessor_config.json"),
        }
    }

    /// The token that `tokenizer_config.json` gives this name, as an attribute of transformers' tokenizer
    /// (in `extra_special_tokens`, or beside it), else `default`.
    pub(crate) fn named_token(&self, name: &str, default: &str) -> Result<String, Error> {
        let config = self.optional_json("tokenizer_config.json")?;
        let nested = format!("extra_special_tokens.{name}");
        let token = config.and_then(|config| config.token(name).or_else(|| config.token(&nested)));
        Ok(token.unwrap_or_else(|| default.to_owned()))
    }

    /// `generation_config.json`'s `eos_token_id`, else `config.json`'s; one id or a list, and none
    /// is fine.
    pub(crate) fn eos_token_ids(&self) -> Result<Vec<i64>, Error> {
        let generation = self.optional_json("generation_config.json")?;
        for config in generation.iter().chain(std::iter::once(&self.config)) {
            match config.get("eos_token_id") {
                None | Some(Value::Null) => {}
                Some(Value::Array(ids)) => {
                    let ids: Option<Vec<i64>> = ids.iter().map(Value::as_i64).collect();
                    return ids.ok_or_else(|| {
                        config.field("eos_token_id", "a list of integers", "another list")
                    });
                }
                Some(_) => return Ok(vec![config.integer("eos_token_id")?]),
            }
        }
        Ok(Vec::new())
    }
}

/// What an image is resized or cropped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// The shorter side; the other in proportion.
    ShortestEdge(usize),
    /// Both sides.
    Sides { height: usize, width: usize },
}

/// One JSON file.
#[derive(Debug, Clone)]
pub(crate) struct Json {
    path: PathBuf,
    value: Value,
}

impl Json {
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        let bytes = read_limited(path, limits::JSON_BYTES)?;
        let value = json::read_tree(&bytes).map_err(|source| Error::Json {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            value,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The same file's facts under other keys.
    fn translated(self, translate: fn(&Value) -> Value) -> Self {
        Self {
            value: translate(&self.value),
            path: self.path,
        }
    }

    /// A field by its dotted name; `None` where any part of the way is missing.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        field
            .split('.')
            .try_fold(&self.value, |value, key| value.get(key))
    }

    /// A special token: a string, or an object with its `content`.
    pub(crate) fn token(&self, field: &str) -> Option<String> {
        let token = self.get(field)?;
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(text.to_owned())
    }

    pub(crate) fn string(&self, field: &str) -> Result<String, Error> {
        self.typed(field, "a string", |value| value.as_str().map(str::to_owned))
    }

    pub(crate) fn integer(&self, field: &str) -> Result<i64, Error> {
        self.typed(field, "an integer", Value::as_i64)
    }

    /// An integer in `1..=limit`, or `default` where the field is missing or null.
    pub(crate) fn size_or(
        &self,
        field: &str,
        default: usize,
        limit: usize,
    ) -> Result<usize, Error> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|size| usize::try_from(size).ok())
                .filter(|size| (1..=limit).contains(size))
                .ok_or_else(|| {
                    self.field(
                        field,
                        &format!("an integer from 1 to {limit}"),
                        &shown(value),
                    )
                }),
        }
    }

    /// A size as image processors write it: one number for the shortest edge (or, with `square`, for
    /// both sides), `{"shortest_edge"}`, or `{"height", "width"}`.
    pub(crate) fn size_of(&self, field: &str, square: bool, limit: usize) -> Result<Size, Error> {
        let side = |value: &Value| {
            let side = value.as_u64().and_then(|side| usize::try_from(side).ok());
            side.filter(|side| (1..=limit).contains(side))
        };
        let read = |value: &Value| match value {
            Value::Object(sides) => match (sides.get("height"), sides.get("width")) {
                (Some(height), Some(width)) => Some(Size::Sides {
                    height: side(height)?,
                    width: side(width)?,
                }),
                _ => Some(Size::ShortestEdge(side(sides.get("shortest_edge")?)?)),
            },
            number if square => Some(Size::Sides {
                height: side(number)?,
                width: side(number)?,
            }),
            number => Some(Size::ShortestEdge(side(number)?)),
        };
        let expected =
            format!("a size, shortest_edge, or height and width, of 1 to {limit} pixels");
        self.typed(field, &expected, read)
    }

    /// A finite number, or `default` where the field is missing or null.
    pub(crate) fn number_or(&self, field: &str, default: f64) -> Result<f64, Error> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.typed(field, "a finite number", |value| {
                value.as_f64().filter(|number| number.is_finite())
            }),
        }
    }

    /// Three finite numbers, or `default` where the field is missing or null.
    pub(crate) fn three_or(&self, field: &str, default: [f64; 3]) -> Result<[f64; 3], Error> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(_) => self.typed(field, "three finite numbers", |value| {
                let numbers: Option<Vec<f64>> = value
                    .as_array()?
                    .iter()
                    .map(|item| item.as_f64().filter(|number| number.is_finite()))
                    .collect();
                numbers?.try_into().ok()
            }),
        }
    }

    /// Refuses a switch that is off: every family here needs it on.
    pub(crate) fn must_be_on(&self, field: &str) -> Result<(), Error> {
        match self.get(field) {
            None | Some(Value::Null | Value::Bool(true)) => Ok(()),
            Some(value) => Err(self.field(field, "true", &shown(value))),
        }
    }

    pub(crate) fn field(&self, field: &str, expected: &str, found: &str) -> Error {
        Error::Config {
            path: self.path.clone(),
            field: field.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }

    fn typed<T>(
        &self,
        field: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T, Error> {
        let value = self
            .get(field)
            .ok_or_else(|| self.field(field, expected, "nothing"))?;
        read(value).ok_or_else(|| self.field(field, expected, &shown(value)))
    }
}

/// A value as an error shows it: whole where short.
pub(crate) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", text.get(..cut).unwrap_or_default()),
        None => text,
    }
}
