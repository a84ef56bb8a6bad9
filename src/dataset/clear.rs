//! CLEAR (Dontsov et al. 2024, arXiv 2410.18057), as `therem/CLEAR` lies on disk: one folder of
//! parquet shards for each configuration.
//!
//! In: `clear:PATH/forget05`. Out: samples. What a row means is told by its columns:
//!
//! | configuration | columns | sample |
//! |---|---|---|
//! | `full`, `forget*`, `retain*` | image, caption, name | caption prompt → caption |
//! | `*_perturbed` | also paraphrased_caption, perturbed_captions | the same, with variants |
//! | `*+tofu` | image or null, caption, question, answer | caption, or text-only question → answer |
//! | `real_faces` | image, answer, options | the name question → answer, or a choice |
//! | `real_world` | image, question, answer, options | question → answer, or a choice |
//!
//! A caption has no question of its own: CLEAR's training draws one of nine prompts. Here row `i` (from
//! 0, over all shards) has prompt `i mod 9`, so that the same data is the same samples.

use std::path::Path;

use super::rows::{Place, dataset};
use super::table::Cell;
use super::{Choice, Dataset, Error, ReadOptions, Sample, Task};

/// CLEAR's nine caption prompts.
pub const CAPTION_PROMPTS: [&str; 9] = [
    "What can you see in this picture?",
    "Tell me about the content of this image",
    "Can you give a description of the image?",
    "What is depicted in the image?",
    "Explain what you observe in the picture.",
    "Describe the image in detail.",
    "What is the main subject of this image?",
    "Can you describe the scene or objects in the image?",
    "What is happening in this image?",
];

/// What is asked about a face that has no question of its own.
pub const NAME_QUESTION: &str = "What is the name of the person in the image?";

/// Reads a configuration's folder.
///
/// # Errors
/// [`Error`].
pub(super) fn read(address: &Path, at: &str, options: &ReadOptions) -> Result<Dataset, Error> {
    dataset(address, Path::new(at), options, |place, row| {
        sample(place, row).map(|sample| vec![sample])
    })
}

fn sample(place: &Place<'_>, row: &Cell) -> Result<Sample, String> {
    let text = |column: &str| {
        let text = row.get(column).text();
        text.map(|text| text.map(str::to_owned))
            .map_err(|problem| format!("`{column}`: {problem}"))
    };
    let texts = |column: &str| {
        let texts = row.get(column).texts();
        texts.map_err(|problem| format!("`{column}`: {problem}"))
    };
    let image = place.image(row.get("image"))?;
    let base = Sample {
        id: place.id(),
        name: text("name")?,
        ..Sample::default()
    };
    if let Some(caption) = text("caption")? {
        let prompt = place.index % CAPTION_PROMPTS.len();
        let question = CAPTION_PROMPTS.get(prompt).copied().unwrap_or_default();
        return Ok(Sample {
            image: Some(image.ok_or("expected an image to the caption, found null")?),
            question: question.to_owned(),
            answer: caption,
            paraphrased_answer: text("paraphrased_caption")?,
            perturbed_answers: texts("perturbed_captions")?,
            ..base
        });
    }
    let answer = text("answer")?.ok_or("expected a caption or an answer, found neither")?;
    let question = match text("question")? {
        Some(question) => question,
        None if image.is_some() => NAME_QUESTION.to_owned(),
        None => return Err("expected a question or an image, found neither".into()),
    };
    let options = texts("options")?;
    let correct = options.iter().position(|option| *option == answer);
    let choice = match correct {
        _ if options.is_empty() => None,
        Some(correct) if options.len() >= 2 => Some(correct),
        _ => return Err("expected two or more `options` with the answer among them".into()),
    };
    let wrong = options.iter().filter(|option| **option != answer);
    Ok(Sample {
        image,
        question,
        perturbed_answers: wrong.cloned().collect(),
        choice: choice.map(|correct| Choice {
            options: options.clone(),
            correct,
        }),
        answer,
        task: Task::Open,
        ..base
    })
}
