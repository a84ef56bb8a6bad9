//! Why a model folder or a sample cannot be prepared.

use std::path::PathBuf;

use crate::dataset::Sample;

/// Why a model folder or a sample cannot be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read, or is larger than any of its kind.
    #[error(transparent)]
    Files(#[from] crate::files::Error),
    /// A configuration file is not JSON.
    #[error("{}: not valid JSON", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A configuration field is missing, mistyped, or asks for what is not implemented.
    #[error("{}: `{field}`: expected {expected}, found {found}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The field, dotted.
        field: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
    /// No family prepares inputs for this `model_type`.
    #[error("{}: no preprocessing for model_type `{found}` (known: {known})", path.display())]
    UnknownFamily {
        /// `config.json`.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
        /// The known ones.
        known: String,
    },
    /// A sample with an image, for a model that takes none.
    #[error("expected no image, because {model_type} takes none, found one")]
    NoImages {
        /// The model's type.
        model_type: String,
    },
    /// The decoder takes embeddings, and nothing makes them of ids.
    #[error(
        "{}: expected a decoder that takes input_ids, or a token embedding beside it, found no token \
         embedding",
        dir.display()
    )]
    NoEmbedding {
        /// The model folder.
        dir: PathBuf,
    },
    /// The folder holds no chat template.
    #[error("{}: no chat_template.jinja, chat_template.json or `chat_template`", dir.display())]
    TemplateMissing {
        /// The model folder.
        dir: PathBuf,
    },
    /// The chat template does not parse.
    #[error("{}: the chat template does not parse", path.display())]
    TemplateSyntax {
        /// The file that holds the template.
        path: PathBuf,
        /// What minijinja said.
        source: minijinja::Error,
    },
    /// The chat template failed, or ran past its limits.
    #[error("{}: the chat template failed", path.display())]
    TemplateRender {
        /// The file that holds the template.
        path: PathBuf,
        /// What minijinja said.
        source: minijinja::Error,
    },
    /// `tokenizer.json` is not a tokenizer.
    #[error("{}: not a tokenizer that can be loaded", path.display())]
    TokenizerLoad {
        /// The file.
        path: PathBuf,
        /// What the tokenizers library said.
        source: tokenizers::Error,
    },
    /// The tokenizer failed on a text or on ids.
    #[error("{}: the tokenizer failed", path.display())]
    Tokenize {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What the tokenizers library said.
        source: tokenizers::Error,
    },
    /// A library panicked on a file; contained.
    #[error("{}: the {library} library panicked: {message}", path.display())]
    Panic {
        /// The file.
        path: PathBuf,
        /// Which library.
        library: &'static str,
        /// The panic's message.
        message: String,
    },
    /// The file is no image of a kind that is read.
    #[error("{}: expected a PNG, JPEG or WebP image, found {found}", path.display())]
    ImageFormat {
        /// The image.
        path: PathBuf,
        /// The format by its first bytes, or `unknown bytes`.
        found: String,
    },
    /// The image's header claims more pixels than are decoded, or none.
    #[error("{}: {width}×{height} pixels, the limit is {limit} pixels in all", path.display())]
    ImageSize {
        /// The image.
        path: PathBuf,
        /// Width in pixels, by the header.
        width: u32,
        /// Height in pixels, by the header.
        height: u32,
        /// Pixels.
        limit: u64,
    },
    /// The image cannot be decoded.
    #[error("{}: the image cannot be decoded", path.display())]
    ImageDecode {
        /// The image.
        path: PathBuf,
        /// What the decoder said.
        source: ::image::ImageError,
    },
    /// The image is too long and thin for the processor (as in transformers).
    #[error("{width}×{height} pixels: the aspect ratio must be at most {limit}")]
    AspectRatio {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// The largest ratio.
        limit: u32,
    },
    /// A filter that a backend does not have.
    #[error("the {backend} backend has no {filter} filter")]
    Filter {
        /// The backend.
        backend: &'static str,
        /// The filter.
        filter: &'static str,
    },
    /// A size that is no size: 0, or past what the arithmetic holds.
    #[error("cannot resize {width}×{height} to {new_width}×{new_height}")]
    ResizeSize {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// Wanted width.
        new_width: usize,
        /// Wanted height.
        new_height: usize,
    },
    /// The answer does not stand, unchanged, where the chat template puts the assistant's turn.
    #[error("{}: answer not in the prompt: {reason}", path.display())]
    AnswerNotInPrompt {
        /// The file that holds the template, or `tokenizer.json` where no token is the answer's.
        path: PathBuf,
        /// What was expected and found.
        reason: String,
    },
    /// A text has another number of image placeholders than the sample has images.
    #[error("{text}: expected {expected} {token} for the images, found {found}")]
    PlaceholderCount {
        /// Which text: the file that holds the template, for what it renders, or the sample's own.
        text: String,
        /// The placeholder, and what makes it one.
        token: String,
        /// Images.
        expected: usize,
        /// Placeholders.
        found: usize,
    },
    /// Image tokens and grids do not agree.
    #[error("the image grids need {expected} image tokens, the prompt has {found}")]
    ImageTokens {
        /// By the grids.
        expected: usize,
        /// In the prompt.
        found: usize,
    },
    /// Image features do not fit the embeddings that they are to be merged into.
    #[error("image features: expected {expected}, found {found}")]
    Features {
        /// Shape or count wanted.
        expected: String,
        /// Shape or count found.
        found: String,
    },
    /// The family has no prompts without an image.
    #[error("the model takes no question without an image")]
    ImageRequired,
    /// A sample failed; the source says why.
    #[error("sample {sample} cannot be prepared")]
    Sample {
        /// [`Sample::called`].
        sample: String,
        /// Why.
        source: Box<Error>,
    },
}

impl Error {
    /// Says which sample it was about, and where that was read.
    #[must_use]
    pub(crate) fn in_sample(self, sample: &Sample) -> Self {
        Self::Sample {
            sample: sample.called(),
            source: Box::new(self),
        }
    }

    /// What the user can do about it, where there is something to say.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::UnknownFamily { .. } => {
                "docs/families.md says how a family is added; ready-made inputs need none (docs/feeds.md)"
            }
            Self::NoImages { .. } => {
                "set `image` to null; a model that sees needs its own config.json"
            }
            Self::NoEmbedding { .. } => {
                "pass the model's folder, not one of its .onnx files; or ready-made inputs_embeds \
                 (docs/feeds.md)"
            }
            Self::TemplateMissing { .. } => {
                "copy chat_template.jinja from the original model's repository"
            }
            Self::TokenizerLoad { .. } => {
                "copy tokenizer.json from the original model's repository"
            }
            Self::ImageFormat { .. } => "convert the image to PNG, JPEG or WebP",
            Self::ImageSize { .. } => "scale the image down; the processor would do so in any case",
            Self::AspectRatio { .. } => "crop the image",
            Self::AnswerNotInPrompt { .. } => {
                "the chat template must write the answer unchanged: trim the whitespace around it"
            }
            Self::PlaceholderCount { .. } => {
                "remove the placeholder from the question and the answer; the template writes it"
            }
            Self::Files(crate::files::Error::Io { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                "copy it from the original model's repository"
            }
            Self::Files(error) => return error.hint(),
            Self::ImageRequired => "leave out the samples whose `image` is null",
            Self::Sample { source, .. } => return source.hint(),
            _ => return None,
        };
        Some(hint.to_owned())
    }
}
