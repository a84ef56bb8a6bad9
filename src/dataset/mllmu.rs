//! MLLMU-Bench (Liu et al. 2024, arXiv 2410.22108), as `MLLMMU/MLLMU-Bench` lies on disk: one folder of
//! parquet shards for each configuration.
//!
//! In: `mllmu:PATH/forget_5`, optionally with a part: `mllmu:PATH/forget_5:cloze-text`. Out: samples.
//!
//! | part | of a row |
//! |---|---|
//! | none | image, question, answer; of `ft_Data` each pair of `metadata`; of `Test_Set` each of `images` |
//! | `generation` | each question of `Generation_Task` |
//! | `cloze` | each question of `Mask_Task`, its blank as "[Blank]" |
//! | `classification` | each question of `Classification_Task`, put as multiple choice only |
//!
//! `-image` or `-text` after a part takes the questions with or without the picture only.

use std::path::Path;

use serde_json::Value;

use super::jsonl::position;
use super::rows::{Place, dataset};
use super::table::Cell;
use super::{Choice, Dataset, Error, ImageSource, ReadOptions, Sample, Task};
use crate::files::json;

/// What of a row is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Profile,
    Generation,
    Cloze,
    Classification,
}

/// The parts, as addresses name them.
const PARTS: [(&str, Part); 3] = [
    ("generation", Part::Generation),
    ("cloze", Part::Cloze),
    ("classification", Part::Classification),
];

/// With or without the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Modality {
    Both,
    Image,
    Text,
}

/// Reads a configuration's folder.
///
/// # Errors
/// [`Error`]; an unknown part.
pub(super) fn read(address: &Path, at: &str, options: &ReadOptions) -> Result<Dataset, Error> {
    let (folder, part, modality) = match at.rsplit_once(':') {
        None => (at, Part::Profile, Modality::Both),
        Some((folder, named)) => {
            let (name, modality) = match named.rsplit_once('-') {
                Some((name, "image")) => (name, Modality::Image),
                Some((name, "text")) => (name, Modality::Text),
                _ => (named, Modality::Both),
            };
            let part = PARTS.iter().find(|(known, _)| *known == name);
            let (_, part) = part.ok_or_else(|| Error::Part {
                address: address.to_owned(),
                found: named.to_owned(),
            })?;
            (folder, *part, modality)
        }
    };
    dataset(address, Path::new(folder), options, |place, row| {
        let asked = samples(place, row, part, modality)?;
        match asked.is_empty() {
            true => Err("expected a question, found none".into()),
            false => Ok(asked),
        }
    })
}

fn samples(
    place: &Place<'_>,
    row: &Cell,
    part: Part,
    modality: Modality,
) -> Result<Vec<Sample>, String> {
    let id = match row.get("ID").text()? {
        Some(id) => format!("{}:{id}", place.set),
        None => place.id(),
    };
    let images = match row.get("images") {
        Cell::List(images) => images.iter().map(|image| place.image(image)).collect(),
        _ => place.image(row.get("image")).map(|image| vec![image]),
    }?;
    let images: Vec<ImageSource> = images.into_iter().flatten().collect();
    let first = images.first();
    match part {
        Part::Profile => profile(row, &id, &images),
        Part::Generation => typed(
            row.get("Generation_Task"),
            "generation",
            &id,
            first,
            modality,
        ),
        Part::Cloze => typed(row.get("Mask_Task"), "cloze", &id, first, modality),
        Part::Classification => {
            let task = row.get("Classification_Task");
            let mut asked = Vec::new();
            if modality != Modality::Text {
                let questions = task.get("Image_Textual_Questions");
                let image = first.ok_or("expected an image to its questions, found null")?;
                asked.extend(classification(
                    questions,
                    &format!("{id}/image"),
                    Some(image),
                )?);
            }
            if modality != Modality::Image {
                let questions = task.get("Pure_Text_Questions");
                asked.extend(classification(questions, &format!("{id}/text"), None)?);
            }
            Ok(asked)
        }
    }
}

/// Question and answer of the row itself, for each of its images; or the pairs of `metadata`.
fn profile(row: &Cell, id: &str, images: &[ImageSource]) -> Result<Vec<Sample>, String> {
    if let Some(metadata) = row.get("metadata").text()? {
        let pairs: Value = json::read_tree(metadata.as_bytes())
            .map_err(|_| "`metadata`: expected JSON".to_owned())?;
        let pairs = pairs.as_array().ok_or("`metadata`: expected an array")?;
        return pairs
            .iter()
            .enumerate()
            .map(|(index, pair)| {
                let text = |key: &str| {
                    let text = pair.get(key).and_then(Value::as_str);
                    let text = text.filter(|text| !text.trim().is_empty());
                    text.map(str::to_owned)
                        .ok_or_else(|| format!("`metadata`: expected a string `{key}`"))
                };
                Ok(Sample {
                    id: format!("{id}/{index}"),
                    image: images.first().cloned(),
                    question: text("Question")?,
                    answer: text("Answer")?,
                    ..Sample::default()
                })
            })
            .collect();
    }
    let required = |column: &str| {
        let text = row.get(column).text()?;
        text.map(str::to_owned)
            .ok_or_else(|| format!("`{column}`: expected a string, found nothing"))
    };
    let (question, answer) = (required("question")?, required("answer")?);
    if images.is_empty() {
        return Err("expected an image, found null".into());
    }
    let samples = images.iter().enumerate().map(|(index, image)| Sample {
        id: match index {
            0 => id.to_owned(),
            _ => format!("{id}/{index}"),
        },
        image: Some(image.clone()),
        question: question.clone(),
        answer: answer.clone(),
        ..Sample::default()
    });
    Ok(samples.collect())
}

/// The text of `field` in a question's struct.
fn field(question: &Cell, field: &str) -> Result<String, String> {
    let text = question
        .get(field)
        .text()
        .map_err(|problem| format!("`{field}`: {problem}"))?;
    text.map(str::to_owned)
        .ok_or_else(|| format!("`{field}`: expected a string, found nothing"))
}

/// Questions with a `Type`: `Image_Textual` or `Pure_Text`.
fn typed(
    questions: &Cell,
    part: &str,
    id: &str,
    image: Option<&ImageSource>,
    modality: Modality,
) -> Result<Vec<Sample>, String> {
    let mut asked = Vec::new();
    for (index, question) in questions.records()?.iter().enumerate() {
        let with_image = match field(question, "Type")?.as_str() {
            "Image_Textual" => true,
            "Pure_Text" => false,
            _ => {
                return Err(
                    "`Type`: expected Image_Textual or Pure_Text, found another text".into(),
                );
            }
        };
        if modality
            == if with_image {
                Modality::Text
            } else {
                Modality::Image
            }
        {
            continue;
        }
        let text = field(question, "Question")?;
        let cloze = part == "cloze";
        asked.push(Sample {
            id: format!("{id}/{part}/{index}"),
            image: match with_image {
                true => Some(
                    image
                        .ok_or("expected an image to its questions, found null")?
                        .clone(),
                ),
                false => None,
            },
            question: if cloze {
                text.replace("__", "[Blank]")
            } else {
                text
            },
            answer: field(question, "Ground_Truth")?,
            task: if cloze { Task::Cloze } else { Task::Open },
            ..Sample::default()
        });
    }
    Ok(asked)
}

fn classification(
    questions: &Cell,
    id: &str,
    image: Option<&ImageSource>,
) -> Result<Vec<Sample>, String> {
    let mut asked = Vec::new();
    for (index, question) in questions.records()?.iter().enumerate() {
        let Cell::Struct(options) = question.get("Options") else {
            return Err("`Options`: expected a struct of A to D".into());
        };
        let mut lettered: Vec<(&String, &Cell)> = options
            .iter()
            .map(|(letter, text)| (letter, text))
            .collect();
        lettered.sort_by_key(|(letter, _)| (*letter).clone());
        let options: Vec<String> = lettered
            .into_iter()
            .filter_map(|(_, text)| text.text().transpose())
            .map(|text| text.map(str::to_owned))
            .collect::<Result<_, _>>()?;
        let answer = field(question, "Correct_Answer")?;
        let correct = position(&options, &answer).filter(|&index| index < options.len());
        let correct = correct.ok_or("`Correct_Answer`: expected the letter of an option")?;
        asked.push(Sample {
            id: format!("{id}/{index}"),
            image: image.cloned(),
            question: field(question, "Question")?,
            answer: options.get(correct).cloned().unwrap_or_default(),
            task: Task::Choice,
            choice: Some(Choice { options, correct }),
            ..Sample::default()
        });
    }
    Ok(asked)
}
