//! Sample → model inputs, as the model's own Hugging Face processor makes them.
//!
//! In: a model folder's configuration ([`open_family`]) and a [`Sample`]. Out: [`Prepared`]: token
//! ids, position ids, which positions predict an answer token, and what the vision encoder is fed. The
//! steps, one file each:
//!
//! ```text
//!           template: messages → text ─ placeholder: image tokens ─ tokenizer: ids, offsets
//!         ╱                      conversation: the way along ─ answer: its tokens           ╲
//!  sample                                                                                     Prepared
//!         ╲                                                                                 ╱
//!           image: file → RGB ─ image_settings: resize, normalize ─ the family: tensors
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
pub mod conversation;
mod error;
pub mod features;
pub mod feeds;
pub mod gemma3;
mod genai;
pub mod idefics3;
pub mod image;
pub mod image_settings;
pub mod internvl;
pub mod llava;
pub mod llava_onevision;
pub mod mllama;
pub mod mrope;
pub mod paligemma;
pub mod patches;
pub mod phi3_v;
pub mod placeholder;
pub mod qwen2_vl;
pub mod resize;
pub mod stretch;
pub mod template;
pub mod tensors;
mod text;
pub mod tiles;
pub mod tokenizer;

use std::ops::Range;
use std::path::Path;

use ndarray::{Array1, Array2};

use crate::dataset::Sample;

pub use config::ModelDir;
pub use conversation::TextProcessor;
pub use error::Error;
pub use features::{FeatureCache, merge_image_features};
pub use feeds::{Feed, FeedError};
pub use tensors::{DecoderInput, NamedTensor, TensorValue};
pub use tokenizer::Tokenizer;

/// What is tried in a child process first.
pub(crate) const CONFINED: [(&str, crate::confine::Reader); 2] = [
    (tokenizer::TOKENIZER, tokenizer::load),
    (template::TEMPLATE, template::rehearse),
];

/// Makes a family from a model folder.
pub type Constructor = fn(&ModelDir) -> Result<Box<dyn Family>, Error>;

/// `config.json`'s `model_type` → the family that prepares its inputs.
pub const FAMILIES: &[(&str, Constructor)] = &[
    ("gemma3", gemma3::open),
    ("idefics3", idefics3::open),
    ("internvl", internvl::open),
    ("llava", llava::open),
    ("llava_onevision", llava_onevision::open),
    ("mllama", mllama::open),
    ("paligemma", paligemma::open),
    ("phi3_v", phi3_v::open),
    ("qwen2_5_vl", qwen2_vl::open),
    ("qwen2_vl", qwen2_vl::open),
    ("qwen3_vl", qwen2_vl::open),
    ("smolvlm", idefics3::open),
];

/// The processor of one model: a chat template, a tokenizer and image settings.
pub trait Family: Send + Sync {
    /// `config.json`'s `model_type`.
    fn name(&self) -> &str;

    /// The id of the token whose embeddings are replaced by image features; `None` where features go
    /// another way, or there are none.
    fn image_token_id(&self) -> Option<i64>;

    /// The model's tokenizer and stop tokens.
    fn text(&self) -> &TextProcessor;

    /// Renders, tokenizes and decodes one sample.
    ///
    /// # Errors
    /// [`Error`]: an image that cannot be decoded, an answer that the template changes, text that
    /// contains the image placeholder.
    fn inputs(&self, sample: &Sample, form: Form) -> Result<Prepared, Error>;

    /// [`Family::inputs`], with the sample's name, and where it was read, in every error.
    ///
    /// # Errors
    /// As [`Family::inputs`].
    fn prepare(&self, sample: &Sample, form: Form) -> Result<Prepared, Error> {
        self.inputs(sample, form)
            .map_err(|error| error.in_sample(sample))
    }

    /// The ids that end a generated answer, from `generation_config.json` or `config.json`; may be
    /// empty.
    fn eos_token_ids(&self) -> &[i64] {
        self.text().eos_token_ids()
    }

    /// The model's tokenizer, for decoding what was generated.
    fn tokenizer(&self) -> &Tokenizer {
        self.text().tokenizer()
    }
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageBackend {
    /// The fast processors (torchvision on CPU).
    Torchvision,
    /// The slow processors (Pillow ≤ 12, numpy).
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
    /// What the decoder takes besides, in families where it takes more.
    pub decoder_inputs: Vec<DecoderInput>,
}

/// The two layouts of position ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PositionIds {
    /// `[T]`: 0, 1, 2, …
    Sequential(Array1<i64>),
    /// `[3, T]`: temporal, height and width rows of multimodal rotary embeddings.
    Multimodal(Array2<i64>),
    /// Not known: 0, 1, 2, … will do where a model has one row of them, and not where it has more.
    Unstated,
}

impl PositionIds {
    /// The largest of them.
    #[must_use]
    pub fn largest(&self) -> Option<i64> {
        match self {
            Self::Sequential(ids) => ids.iter().max().copied(),
            Self::Multimodal(ids) => ids.iter().max().copied(),
            Self::Unstated => None,
        }
    }
}

/// What the vision encoder is fed for one image.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageInputs {
    /// Equal keys mean equal tensors: so features are computed once per key ([`FeatureCache`]).
    pub key: ImageKey,
    /// All that the model's image processor makes, under its names: `pixel_values` and, in some
    /// families, `image_grid_thw`, `image_sizes`, `pixel_attention_mask`, …
    pub tensors: Vec<NamedTensor>,
}

impl ImageInputs {
    /// The tensor of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&TensorValue> {
        let found = self.tensors.iter().find(|tensor| tensor.name == name);
        found.map(|tensor| &tensor.value)
    }
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
    open(&ModelDir::open(model_dir)?)
}

/// [`open_family`] with a chosen image arithmetic.
///
/// # Errors
/// As [`open_family`].
pub fn open_family_with(model_dir: &Path, backend: ImageBackend) -> Result<Box<dyn Family>, Error> {
    open(&ModelDir::open(model_dir)?.with_backend(backend))
}

fn open(model: &ModelDir) -> Result<Box<dyn Family>, Error> {
    let model_type = model.config().string("model_type")?;
    match FAMILIES.iter().find(|(name, _)| *name == model_type) {
        Some((_, open)) => open(model),
        None if text::serves(model) => text::open(model),
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
