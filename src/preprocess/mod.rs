//! Sample → model inputs, as the model's own Hugging Face processor makes them.
//!
//! In: a model folder's configuration ([`open_family`]) and a [`Sample`]. Out: [`Prepared`]: token
//! ids, position ids, which positions predict an answer token, and the image's patches. The steps,
//! one file each:
//!
//! ```text
//!           template: messages → text ─ answer: its bytes ─ tokenizer: ids, offsets
//!         ╱                                                                        ╲
//!  sample                                                                            Prepared
//!         ╲                                                                        ╱
//!           image: file → RGB ─ resize ─ patches: pixel_values, grid ─ mrope: positions
//! ```
//!
//! Promised: what comes out equals transformers 4.57's processor: ids, masks and positions exactly;
//! pixel values exactly for PNG and WebP, and up to the JPEG decoder's rounding for JPEG; see
//! [`ImageBackend`]. No file makes this code panic, and an image is refused by its header before
//! its pixels are allocated. An answer that is not found is an error, never a guess.
//!
//! **A new family** is one file with a constructor, and one line in [`FAMILIES`].

pub mod answer;
mod config;
mod error;
pub mod features;
pub mod image;
pub mod mrope;
pub mod patches;
pub mod qwen2_vl;
pub mod resize;
pub mod template;
pub mod tokenizer;

use std::ops::Range;
use std::path::Path;

use ndarray::{Array1, Array2};

use crate::dataset::Sample;

pub use config::ModelDir;
pub use error::Error;
pub use features::{FeatureCache, merge_image_features};
pub use tokenizer::Tokenizer;

/// Makes a family from a model folder.
pub type Constructor = fn(&ModelDir, ImageBackend) -> Result<Box<dyn Family>, Error>;

/// `config.json`'s `model_type` → the family that prepares its inputs.
pub const FAMILIES: &[(&str, Constructor)] = &[("qwen2_vl", qwen2_vl::open)];

/// The processor of one model: a chat template, a tokenizer and image settings.
pub trait Family: Send + Sync {
    /// `config.json`'s `model_type`.
    fn name(&self) -> &'static str;

    /// The id of the token whose embeddings are replaced by image features.
    fn image_token_id(&self) -> i64;

    /// The ids that end a generated answer, from `generation_config.json` or `config.json`; may be
    /// empty.
    fn eos_token_ids(&self) -> &[i64];

    /// The model's tokenizer, for decoding what was generated.
    fn tokenizer(&self) -> &Tokenizer;

    /// Renders, tokenizes and decodes one sample.
    ///
    /// # Errors
    /// [`Error`], naming the sample: an image that cannot be decoded, an answer that the template
    /// changes, text that contains the image placeholder.
    fn prepare(&self, sample: &Sample, form: Form) -> Result<Prepared, Error>;
}

/// Which conversation is rendered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Form {
    /// The user's turn and the assistant's answer: for coefficients and likelihoods. Whitespace
    /// that a template writes after the last turn is left out, as the method's original code does.
    WithAnswer,
    /// The user's turn and the generation prompt: for generating.
    Question,
}

/// Whose image arithmetic is followed.
///
/// Both are reproduced to the last bit from the same RGB pixels. From each other they differ by one
/// level of 255 on the pictures of the fixtures (0.015 in pixel values) and by up to two on noise, in
/// 0.7 % of the bytes; on equal levels, by 2.4e-7 in the normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ImageBackend {
    /// The fast processors (torchvision on CPU), which `AutoProcessor` picks from transformers 4.57
    /// on.
    #[default]
    Torchvision,
    /// The slow processors (Pillow ≤ 12, numpy), `use_fast=False`.
    Pillow,
}

/// One sample as model inputs; `T` is the number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// The sample's id.
    pub id: String,
    /// `[T]`; the image placeholder is expanded to one token per image feature.
    pub input_ids: Vec<i64>,
    /// The position ids of the `T` tokens.
    pub position_ids: PositionIds,
    /// `[T]`: true at `t` iff token `t + 1` belongs to the answer, that is, iff position `t`
    /// predicts an answer token. All false for [`Form::Question`].
    pub answer_mask: Vec<bool>,
    /// How many tokens belong to the answer: the number of true entries in `answer_mask`.
    pub answer_tokens: usize,
    /// For every answer token in order, the bytes of `Sample::answer` that it covers, so that a
    /// rule can weigh some of them (a name).
    pub answer_offsets: Vec<Range<usize>>,
    /// The image, where the sample has one.
    pub image: Option<ImageInputs>,
    /// The position id of the first token after these: the largest one + 1.
    pub next_position: i64,
}

/// The two layouts of position ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PositionIds {
    /// `[T]`: 0, 1, 2, …
    Sequential(Array1<i64>),
    /// `[3, T]`: temporal, height and width rows of multimodal rotary embeddings.
    Multimodal(Array2<i64>),
}

/// What the vision encoder is fed for one image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageInputs {
    /// Equal keys mean equal `pixel_values`: so features are computed once per key
    /// ([`FeatureCache`]).
    pub key: ImageKey,
    /// `[t·h·w, C·T·P·P]`: one flattened patch a row, in the order that the vision encoder merges
    /// them.
    pub pixel_values: Array2<f32>,
    /// Patches in time, height and width.
    pub grid_thw: [i64; 3],
}

/// SHA-256 of an image file's bytes and of the processor's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageKey(pub [u8; 32]);

/// Opens the family of a model folder, with the image arithmetic that `AutoProcessor` would pick.
///
/// Reads `config.json`, `preprocessor_config.json` (or `processor_config.json`'s
/// `image_processor`), `tokenizer.json`, `tokenizer_config.json`, and the chat template:
/// `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`'s
/// `chat_template`.
///
/// # Errors
/// [`Error`], naming the file: missing, not JSON, a field of the wrong type, or a `model_type` that
/// no family serves.
pub fn open_family(model_dir: &Path) -> Result<Box<dyn Family>, Error> {
    open_family_with(model_dir, ImageBackend::default())
}

/// [`open_family`] with a chosen image arithmetic.
///
/// # Errors
/// As [`open_family`].
pub fn open_family_with(model_dir: &Path, backend: ImageBackend) -> Result<Box<dyn Family>, Error> {
    let model = ModelDir::open(model_dir)?;
    let model_type = model.config().string("model_type")?;
    match FAMILIES.iter().find(|(name, _)| *name == model_type) {
        Some((_, open)) => open(&model, backend),
        None => Err(Error::UnknownFamily {
            path: model.config().path().to_path_buf(),
            found: model_type,
            known: FAMILIES
                .iter()
                .map(|(name, _)| *name)
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}
