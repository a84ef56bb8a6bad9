//! A model folder: which files it has, and what each of them is.
//!
//! In: a path that a user gave, a folder or one `.onnx` file. Out: a [`Bundle`]: every file of it
//! ([`Tree`]), the ONNX files with role and variant, and the few facts of `config.json` that the
//! rest of the tool relies on.
//!
//! Promises:
//! - nothing outside the folder (or its Hugging Face cache entry) is named: links are resolved and
//!   contained, devices and pipes refused;
//! - JSON is capped in size, and each fault in it is named by file and key;
//! - a folder that is not understood is refused, with what was looked for.
//!
//! A layout is one file here and one line in `LAYOUTS`.

mod config;
mod consistency;
mod error;
mod mobius;
mod names;
mod onnxruntime_genai;
mod optimum;
mod single_file;
mod transformers_exporter;
mod transformers_js;
mod tree;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use config::{Config, read_json, read_json_tree};
pub use consistency::check_one_model;
pub use error::Error;
pub use names::{CacheNames, DecoderNames};
pub(crate) use tree::beside;
pub use tree::{Entry, Tree};

/// How a model folder is organized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Layout {
    /// `onnx/{vision_encoder,embed_tokens,decoder_model_merged}<suffix>.onnx`, as onnx-community
    /// publishes.
    TransformersJs,
    /// Files as `genai_config.json` names them.
    OnnxruntimeGenai,
    /// Files as `export.json` names them, by transformers' own exporter.
    TransformersExporter,
    /// `{decoder,vision_encoder,embedding}/model.onnx`.
    Mobius,
    /// `model*.onnx` or `decoder_model*.onnx` beside the configuration.
    Optimum,
    /// One `.onnx` file, with its external data.
    SingleFile,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layout::TransformersJs => "transformers-js",
            Layout::OnnxruntimeGenai => "onnxruntime-genai",
            Layout::TransformersExporter => "transformers-exporter",
            Layout::Mobius => "mobius",
            Layout::Optimum => "optimum",
            Layout::SingleFile => "single-file",
        })
    }
}

/// What an ONNX file does in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The language model's layers.
    Decoder,
    /// Images to features.
    VisionEncoder,
    /// Token ids to embeddings, in some layouts with image features already in place.
    EmbedTokens,
    /// Hidden states to logits, where the decoder leaves that to another file.
    LmHead,
    /// Anything else.
    Other,
}

/// Which part of a generation a decoder file serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// All of it.
    Any,
    /// The prompt: there is no cache yet.
    Prefill,
    /// Every token after it, over the cache.
    Decode,
}

/// One ONNX file of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnnxFile {
    /// The file, inside the folder as it was given (external data is sought beside it).
    pub path: PathBuf,
    /// Its path relative to the folder, with `/`.
    pub relative: String,
    /// What it does.
    pub role: Role,
    /// The precision that its name tells (`fp16`, `q4`), empty for none.
    pub variant: String,
    /// Which part of a generation it serves, if it is a decoder.
    pub phase: Phase,
}

/// An ONNX file as a layout recognized it.
struct Recognized {
    relative: String,
    role: Role,
    variant: String,
    phase: Phase,
}

/// A folder as a layout recognized it.
struct Recognition {
    /// Every ONNX file.
    files: Vec<Recognized>,
    names: DecoderNames,
}

/// A layout, as a rule over the files of a folder.
struct Rule {
    layout: Layout,
    /// What is looked for, to finish "expected …".
    looks_for: &'static str,
    /// The ONNX files with their roles, or `None` where the folder has another layout. An error where
    /// it has this one, and something is wrong with it.
    recognize: fn(&Tree) -> Result<Option<Recognition>, Error>,
}

/// Every known layout, the most particular first.
const LAYOUTS: &[Rule] = &[
    onnxruntime_genai::RULE,
    transformers_exporter::RULE,
    mobius::RULE,
    transformers_js::RULE,
    optimum::RULE,
    single_file::RULE,
];

/// The files that one forward pass needs.
#[derive(Clone, Copy, Debug)]
pub struct Components<'b> {
    /// The decoder: what coefficients are collected on.
    pub decoder: &'b OnnxFile,
    /// The decoder of further tokens, where `decoder` serves the prompt alone.
    pub decode: Option<&'b OnnxFile>,
    /// Hidden states to logits, where the decoder does not make them.
    pub lm_head: Option<&'b OnnxFile>,
    /// The token embedding, where it is a file of its own.
    pub embed_tokens: Option<&'b OnnxFile>,
    /// The vision encoder, where it is a file of its own.
    pub vision_encoder: Option<&'b OnnxFile>,
}

/// A model folder that was understood.
#[derive(Clone, Debug)]
pub struct Bundle {
    tree: Tree,
    layout: Layout,
    files: Vec<OnnxFile>,
    names: DecoderNames,
    config: Option<Config>,
}

impl Bundle {
    /// Opens the model folder, or the single `.onnx` file, at `path`.
    ///
    /// # Errors
    /// Nothing is there, no layout matches, a file that the layout needs is missing, a link dangles
    /// or leads out, or `config.json` contradicts what is needed of it.
    pub fn open(path: &Path) -> Result<Bundle, Error> {
        let metadata = std::fs::metadata(path).map_err(crate::files::Error::io("open", path))?;
        let tree = match metadata.is_dir() {
            true => Tree::of_folder(path)?,
            false => Tree::of_model(path)?,
        };
        let (layout, recognition) = recognize(path, &tree)?;
        let config = Config::read(&tree)?;
        let files: Vec<OnnxFile> = recognition
            .files
            .into_iter()
            .map(|file| OnnxFile {
                path: tree.folder().join(&file.relative),
                relative: file.relative,
                role: file.role,
                variant: file.variant,
                phase: file.phase,
            })
            .collect();
        let bundle = Bundle {
            tree,
            layout,
            files,
            names: recognition.names,
            config,
        };
        bundle.check_siblings()?;
        Ok(bundle)
    }

    /// The model folder; for a single file, the folder it lies in.
    pub fn folder(&self) -> &Path {
        self.tree.folder()
    }

    /// Every file of the model, ONNX or not.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// How the folder is organized.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The ONNX files, by relative path.
    pub fn files(&self) -> &[OnnxFile] {
        &self.files
    }

    /// What the decoder's inputs and outputs are called.
    pub fn decoder_names(&self) -> &DecoderNames {
        &self.names
    }

    /// The facts of `config.json`, where there is one.
    pub fn config(&self) -> Option<&Config> {
        self.config.as_ref()
    }

    /// The model's family: `model_type` of `config.json`.
    pub fn family(&self) -> Option<&str> {
        self.config
            .as_ref()
            .map(|config| config.model_type.as_str())
    }

    /// The number of decoder layers, where `config.json` tells it.
    pub fn layers(&self) -> Option<usize> {
        self.config.as_ref()?.num_hidden_layers
    }

    /// The decoder files, all variants.
    pub fn decoders(&self) -> impl Iterator<Item = &OnnxFile> {
        self.files.iter().filter(|file| file.role == Role::Decoder)
    }

    /// Whether there is a file with this role.
    pub fn has(&self, role: Role) -> bool {
        self.files.iter().any(|file| file.role == role)
    }

    /// The files to run: with `variant` the decoder of that name, else the most precise one (no
    /// suffix, then `fp16`, then the first by name). The others follow the decoder's variant where
    /// they have it: components may mix suffixes.
    ///
    /// Of the decoders of one variant, the one for prompts is run if there is one: it is the plainest
    /// graph, and the weights are the same. The one for further tokens comes along.
    ///
    /// # Errors
    /// [`Error::Variant`] where no decoder has that variant; [`Error::MissingSibling`] where there is
    /// only a decoder that continues from a cache.
    pub fn components(&self, variant: Option<&str>) -> Result<Components<'_>, Error> {
        // `none` and `fp32` are how users call the file without a suffix.
        let wanted = variant.map(|name| match name {
            "none" | "fp32" => "",
            name => name,
        });
        let chosen = match wanted {
            Some(wanted) => self.decoders().find(|file| file.variant == wanted),
            None => self.most_precise(Role::Decoder),
        };
        let chosen = chosen.ok_or_else(|| Error::Variant {
            folder: self.folder().to_owned(),
            wanted: variant.unwrap_or("any").to_owned(),
            available: self.variants(),
        })?;
        let serving = |phase| {
            self.decoders()
                .find(|file| file.variant == chosen.variant && file.phase == phase)
        };
        let prefill = serving(Phase::Prefill);
        let decoder =
            prefill
                .or_else(|| serving(Phase::Any))
                .ok_or_else(|| Error::MissingSibling {
                    folder: self.folder().to_owned(),
                    looked_for: chosen.relative.replace("_with_past_model", "_model"),
                    needed_by: chosen.relative.clone(),
                })?;
        let follow = |role| {
            self.files
                .iter()
                .find(|file| file.role == role && file.variant == decoder.variant)
                .or_else(|| self.most_precise(role))
        };
        Ok(Components {
            decoder,
            decode: prefill.and_then(|_| serving(Phase::Decode)),
            lm_head: follow(Role::LmHead),
            embed_tokens: follow(Role::EmbedTokens),
            vision_encoder: follow(Role::VisionEncoder),
        })
    }

    /// The decoder variants that exist, the file without a suffix as `none`.
    fn variants(&self) -> Vec<String> {
        let mut variants: Vec<String> = self
            .decoders()
            .map(|file| match file.variant.as_str() {
                "" => "none".to_owned(),
                name => name.to_owned(),
            })
            .collect();
        variants.dedup();
        variants
    }

    fn most_precise(&self, role: Role) -> Option<&OnnxFile> {
        self.files
            .iter()
            .filter(|file| file.role == role)
            .min_by_key(|file| match file.variant.as_str() {
                "" => 0,
                "fp16" => 1,
                _ => 2,
            })
    }

    /// A decoder of a vision-language model reads embeddings: somebody must make them.
    fn check_siblings(&self) -> Result<(), Error> {
        let sees = self.has(Role::VisionEncoder) || self.config.as_ref().is_some_and(|c| c.vision);
        let looked_for = match self.layout {
            Layout::TransformersJs => "onnx/embed_tokens*.onnx",
            Layout::Mobius => "embedding/model.onnx",
            Layout::OnnxruntimeGenai => "model.embedding of genai_config.json",
            _ => return Ok(()),
        };
        // A lone decoder may hold both towers.
        let split = self.layout != Layout::TransformersJs || self.files.len() > 1;
        if sees && split && !self.has(Role::EmbedTokens) {
            return Err(Error::MissingSibling {
                folder: self.folder().to_owned(),
                looked_for: looked_for.to_owned(),
                needed_by: self
                    .decoders()
                    .next()
                    .map(|file| file.relative.clone())
                    .unwrap_or_default(),
            });
        }
        Ok(())
    }
}

/// The first layout that the files have. A file that was given itself is one, whatever lies beside it.
fn recognize(path: &Path, tree: &Tree) -> Result<(Layout, Recognition), Error> {
    if !tree.is_whole_folder() {
        let lone = single_file::recognize(tree)?.ok_or_else(|| unknown_layout(path, tree))?;
        return Ok((Layout::SingleFile, lone));
    }
    for rule in LAYOUTS {
        if let Some(recognition) = (rule.recognize)(tree)? {
            return Ok((rule.layout, recognition));
        }
    }
    Err(unknown_layout(path, tree))
}

fn unknown_layout(path: &Path, tree: &Tree) -> Error {
    let looked_for: Vec<&str> = LAYOUTS.iter().map(|rule| rule.looks_for).collect();
    let onnx: Vec<&str> = tree.onnx().map(|entry| entry.relative.as_str()).collect();
    let found = match onnx.as_slice() {
        [] => "no .onnx file".to_owned(),
        [first, second, _, _, ..] => format!("{first}, {second} and {} more", onnx.len() - 2),
        few => few.join(", "),
    };
    Error::UnknownLayout {
        path: path.to_owned(),
        looked_for: looked_for.join(", or "),
        found,
    }
}
