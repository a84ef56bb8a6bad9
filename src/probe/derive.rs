//! The probes: each makes questions out of what a set's columns say.
//!
//! In: the samples of a set, and of all sets of the run ([`Material`]). Out: samples that ask for the
//! same knowledge in another way, or the reason why the set does not have what that needs. The words
//! are English; other wordings come from the column `paraphrased_questions`.

use std::collections::BTreeSet;

use crate::dataset::{Choice, Sample, Task};
use crate::kvw::Draws;

/// What probes are made of.
pub struct Material<'a> {
    /// The set.
    pub set: &'a [Sample],
    /// Every sample of every set of the run, this one's too.
    pub all: &'a [&'a Sample],
}

/// One way of asking for what a set is about.
pub struct Probe {
    /// Its name in results.
    pub name: &'static str,
    /// What is asked, in a line.
    pub asks: &'static str,
    make: fn(&Material<'_>) -> Result<Vec<Sample>, &'static str>,
}

impl Probe {
    /// The probe's samples. A sample's id is that of the one that it was made of, with something added.
    ///
    /// # Errors
    /// What the set lacks.
    pub fn samples(&self, material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
        (self.make)(material)
    }
}

/// Every probe. A new one is a function and an entry here.
pub static PROBES: &[Probe] = &[
    Probe {
        name: "other_images",
        asks: "the set's question, about images of the same people that only other sets have",
        make: other_images,
    },
    Probe {
        name: "paraphrased_questions",
        asks: "the questions in other words, from the column `paraphrased_questions`",
        make: paraphrased_questions,
    },
    Probe {
        name: "facts_by_name",
        asks: "every fact of everybody, by name and without an image",
        make: facts_by_name,
    },
    Probe {
        name: "facts_by_image",
        asks: "every fact of everybody, about an image and without the name",
        make: facts_by_image,
    },
    Probe {
        name: "name_by_facts",
        asks: "everybody's name, by their facts and without an image",
        make: name_by_facts,
    },
    Probe {
        name: "hint_facts",
        asks: "the questions that do not name the person, after a hint with the facts",
        make: hint_facts,
    },
    Probe {
        name: "hint_first_name",
        asks: "the questions that do not name the person, after a hint with the first name",
        make: hint_first_name,
    },
    Probe {
        name: "multiple_choice",
        asks: "which of several answers the model finds likeliest; from the columns `options` and \
               `correct`, or other people's names in the place of the right one",
        make: multiple_choice,
    },
];

/// Wrong answers beside the right one, where names are put in.
const OTHER_NAMES: usize = 3;

/// `sample` asked otherwise. Variants of the old answer do not belong to it.
fn asked(sample: &Sample, suffix: &str, question: String, answer: String) -> Sample {
    Sample {
        id: format!("{}/{suffix}", sample.id),
        question,
        answer,
        task: Task::Open,
        paraphrased_answer: None,
        perturbed_answers: Vec::new(),
        paraphrased_questions: Vec::new(),
        choice: None,
        ..sample.clone()
    }
}

fn or_reason(samples: Vec<Sample>, reason: &'static str) -> Result<Vec<Sample>, &'static str> {
    match samples.is_empty() {
        true => Err(reason),
        false => Ok(samples),
    }
}

/// The first sample of everybody in the set for which `of` gives something.
fn of_everybody<'a, T>(
    set: &'a [Sample],
    of: impl Fn(&'a Sample, &'a str) -> Option<T>,
) -> Vec<(&'a Sample, &'a str, T)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for sample in set {
        let Some(name) = sample.name.as_deref() else {
            continue;
        };
        if !seen.contains(name)
            && let Some(value) = of(sample, name)
        {
            seen.insert(name);
            found.push((sample, name, value));
        }
    }
    found
}

fn names_the_person(sample: &Sample) -> bool {
    let question = sample.question.to_lowercase();
    sample
        .name
        .as_ref()
        .is_none_or(|name| question.contains(&name.to_lowercase()))
}

fn other_images(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let own: Vec<_> = material
        .set
        .iter()
        .filter_map(|s| s.image.as_ref())
        .collect();
    let mut made = Vec::new();
    for (sample, name, _) in of_everybody(material.set, |sample, _| sample.image.as_ref()) {
        let mut taken = own.clone();
        for other in material.all {
            if let Some(image) = &other.image
                && other.name.as_deref() == Some(name)
                && !taken.contains(&image)
            {
                taken.push(image);
                let (question, answer) = (sample.question.clone(), sample.answer.clone());
                made.push(Sample {
                    image: Some(image.clone()),
                    ..asked(sample, &other.id, question, answer)
                });
            }
        }
    }
    or_reason(
        made,
        "no other set of the run has another image of a person of this one",
    )
}

fn paraphrased_questions(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let made = material.set.iter().flat_map(|sample| {
        let wordings = sample.paraphrased_questions.iter().enumerate();
        wordings.map(|(index, question)| {
            let suffix = format!("paraphrase{}", index + 1);
            asked(sample, &suffix, question.clone(), sample.answer.clone())
        })
    });
    or_reason(
        made.collect(),
        "no sample has the column `paraphrased_questions`",
    )
}

const NO_FACTS: &str = "no sample has both `name` and `facts`";

fn facts_by_name(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let facts = |sample: &'_ Sample, _: &str| (!sample.facts.is_empty()).then_some(());
    let mut made = Vec::new();
    for (sample, name, ()) in of_everybody(material.set, facts) {
        for (kind, value) in &sample.facts {
            let question = format!("What is the {kind} of {name}?");
            made.push(Sample {
                image: None,
                ..asked(sample, kind, question, value.clone())
            });
        }
    }
    or_reason(made, NO_FACTS)
}

fn facts_by_image(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let image_of = |sample: &'_ Sample, name: &str| {
        let mut images = material
            .all
            .iter()
            .filter(|other| other.name.as_deref() == Some(name))
            .filter_map(|other| other.image.clone());
        match sample.facts.is_empty() {
            true => None,
            false => sample.image.clone().or_else(|| images.next()),
        }
    };
    let mut made = Vec::new();
    for (sample, _, image) in of_everybody(material.set, image_of) {
        for (kind, value) in &sample.facts {
            let question = format!("What is the {kind} of the person in the image?");
            made.push(Sample {
                image: Some(image.clone()),
                ..asked(sample, kind, question, value.clone())
            });
        }
    }
    or_reason(
        made,
        "nobody has `name` and `facts`, and an image in any set of the run",
    )
}

/// `job is potter and town is Silaville`.
fn listed(sample: &Sample) -> String {
    let facts = sample.facts.iter();
    let facts: Vec<String> = facts
        .map(|(kind, value)| format!("{kind} is {value}"))
        .collect();
    facts.join(" and ")
}

fn name_by_facts(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let facts = |sample: &'_ Sample, _: &str| (!sample.facts.is_empty()).then_some(());
    let made = of_everybody(material.set, facts)
        .into_iter()
        .map(|(sample, name, ())| {
            let question = format!("Who is the person whose {}?", listed(sample));
            Sample {
                image: None,
                ..asked(sample, "name", question, name.to_owned())
            }
        });
    or_reason(made.collect(), NO_FACTS)
}

/// The samples whose question does not name the person, each with a hint before the question.
fn hinted(
    material: &Material<'_>,
    hint: impl Fn(&Sample) -> Option<String>,
) -> impl Iterator<Item = Sample> {
    let silent = material
        .set
        .iter()
        .filter(|sample| !names_the_person(sample));
    silent.filter_map(move |sample| {
        let question = format!("{} {}", hint(sample)?, sample.question);
        Some(asked(sample, "hint", question, sample.answer.clone()))
    })
}

fn hint_facts(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let made = hinted(material, |sample| {
        (!sample.facts.is_empty()).then(|| format!("The person's {}.", listed(sample)))
    });
    or_reason(
        made.collect(),
        "no sample with `name` and `facts` has a question that does not name the person",
    )
}

fn hint_first_name(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let made = hinted(material, |sample| {
        let mut parts = sample.name.as_deref()?.split_whitespace();
        let first = parts.next()?;
        parts
            .next()
            .map(|_| format!("The person's first name is {first}."))
    });
    or_reason(
        made.collect(),
        "no sample with a `name` of two parts has a question that does not name the person",
    )
}

fn multiple_choice(material: &Material<'_>) -> Result<Vec<Sample>, &'static str> {
    let names: BTreeSet<&str> = material
        .all
        .iter()
        .filter_map(|sample| sample.name.as_deref())
        .collect();
    let names: Vec<&str> = names.into_iter().collect();
    let mut draws = Draws::new(0);
    let made = material.set.iter().filter_map(|sample| {
        let (answer, wrong) = match &sample.choice {
            Some(choice) => of_options(sample, choice)?,
            None => of_names(sample, &names, &mut draws)?,
        };
        Some(Sample {
            perturbed_answers: wrong,
            ..asked(sample, "choice", sample.question.clone(), answer)
        })
    });
    or_reason(
        made.collect(),
        "no sample has `options` and `correct`, or a `name` in its answer that other people's could replace",
    )
}

/// The right answer and the wrong ones: the sample's answer with each option in the place of the
/// right one, or the options by themselves where the answer does not hold it.
fn of_options(sample: &Sample, choice: &Choice) -> Option<(String, Vec<String>)> {
    let right = choice.options.get(choice.correct)?;
    let within = sample.answer.contains(right.as_str());
    let place = |option: &String| match within {
        true => sample.answer.replace(right.as_str(), option),
        false => option.clone(),
    };
    let others = choice.options.iter().enumerate();
    let wrong = others
        .filter(|(index, _)| *index != choice.correct)
        .map(|(_, option)| place(option));
    Some((place(right), wrong.collect()))
}

/// The sample's answer, and the same with other people's names; nothing where the question names the
/// person.
fn of_names(sample: &Sample, names: &[&str], draws: &mut Draws) -> Option<(String, Vec<String>)> {
    let name = sample.name.as_deref()?;
    if names_the_person(sample) || !sample.answer.contains(name) {
        return None;
    }
    let order = draws.permutation(names.len());
    let others = order.iter().filter_map(|&index| names.get(index));
    let wrong: Vec<String> = others
        .filter(|other| **other != name)
        .take(OTHER_NAMES)
        .map(|other| sample.answer.replace(name, other))
        .collect();
    (!wrong.is_empty()).then(|| (sample.answer.clone(), wrong))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::dataset::ImageSource;

    fn sample(id: &str, image: Option<&str>, question: &str, name: &str) -> Sample {
        Sample {
            id: id.into(),
            image: image.map(|path| ImageSource::File(path.into())),
            question: question.into(),
            answer: format!("This is {name}."),
            name: Some(name.into()),
            facts: BTreeMap::from([
                ("job".to_owned(), "baker".to_owned()),
                ("town".to_owned(), "Oslo".to_owned()),
            ]),
            ..Sample::default()
        }
    }

    fn made(name: &str, set: &[Sample], others: &[Sample]) -> Result<Vec<Sample>, &'static str> {
        let all: Vec<&Sample> = set.iter().chain(others).collect();
        let probe = PROBES.iter().find(|probe| probe.name == name).unwrap();
        probe.samples(&Material { set, all: &all })
    }

    fn questions(samples: &[Sample]) -> Vec<(&str, bool, &str, &str)> {
        samples
            .iter()
            .map(|s| {
                (
                    s.id.as_str(),
                    s.image.is_some(),
                    s.question.as_str(),
                    s.answer.as_str(),
                )
            })
            .collect()
    }

    fn set() -> Vec<Sample> {
        vec![
            sample("a1", Some("a1.png"), "Who is it?", "Ada Byron"),
            sample("a2", Some("a2.png"), "Who is it?", "Ada Byron"),
            sample("b", None, "Tell me about Bob Ross.", "Bob Ross"),
        ]
    }

    #[test]
    fn facts_are_asked_once_per_person_by_name_and_by_image() {
        assert_eq!(
            questions(&made("facts_by_name", &set(), &[]).unwrap()),
            [
                ("a1/job", false, "What is the job of Ada Byron?", "baker"),
                ("a1/town", false, "What is the town of Ada Byron?", "Oslo"),
                ("b/job", false, "What is the job of Bob Ross?", "baker"),
                ("b/town", false, "What is the town of Bob Ross?", "Oslo"),
            ]
        );
        // A picture of Bob lies in another set only.
        let other = [sample("b9", Some("b9.png"), "Who?", "Bob Ross")];
        let by_image = made("facts_by_image", &set(), &other).unwrap();
        assert_eq!(by_image.len(), 4);
        assert!(by_image.iter().all(|sample| sample.image.is_some()));
        let question = "What is the job of the person in the image?";
        assert_eq!(by_image[2].question, question);
        let names = made("name_by_facts", &set(), &[]).unwrap();
        assert_eq!(
            questions(&names)[0],
            (
                "a1/name",
                false,
                "Who is the person whose job is baker and town is Oslo?",
                "Ada Byron"
            )
        );
    }

    #[test]
    fn a_hint_stands_before_questions_that_do_not_name_the_person() {
        let facts = made("hint_facts", &set(), &[]).unwrap();
        assert_eq!(facts.len(), 2);
        assert_eq!(
            facts[0].question,
            "The person's job is baker and town is Oslo. Who is it?"
        );
        let first = made("hint_first_name", &set(), &[]).unwrap();
        assert_eq!(
            first[1].question,
            "The person's first name is Ada. Who is it?"
        );
    }

    #[test]
    fn other_images_are_those_that_only_other_sets_have() {
        let others = [
            sample("x", Some("a2.png"), "?", "Ada Byron"),
            sample("y", Some("a7.png"), "?", "Ada Byron"),
            sample("z", Some("c.png"), "?", "Cem Ay"),
        ];
        let made = made("other_images", &set(), &others).unwrap();
        assert_eq!(
            questions(&made),
            [("a1/y", true, "Who is it?", "This is Ada Byron.")]
        );
        assert_eq!(made[0].image, Some(ImageSource::File("a7.png".into())));
    }

    #[test]
    fn choices_are_the_options_or_other_peoples_names() {
        let mut set = set();
        set[0].choice = Some(Choice {
            options: vec!["Eve".into(), "Ada Byron".into()],
            correct: 1,
        });
        set[1].answer = "No name here.".into();
        let others = [sample("c", None, "?", "Cem Ay")];
        let made = made("multiple_choice", &set, &others).unwrap();
        assert_eq!(
            made.len(),
            1,
            "a2 has no name in its answer, b one in its question"
        );
        assert_eq!(made[0].answer, "This is Ada Byron.");
        assert_eq!(made[0].perturbed_answers, ["This is Eve."]);
        set[0].choice = None;
        let made = self::made("multiple_choice", &set, &others).unwrap();
        let mut wrong = made[0].perturbed_answers.clone();
        wrong.sort();
        assert_eq!(wrong, ["This is Bob Ross.", "This is Cem Ay."]);
    }

    #[test]
    fn a_set_without_what_a_probe_needs_says_so() {
        let bare = [Sample {
            id: "a".into(),
            question: "What is it?".into(),
            answer: "A circle.".into(),
            ..Sample::default()
        }];
        for probe in PROBES {
            let reason = made(probe.name, &bare, &[]).unwrap_err();
            assert!(!reason.is_empty(), "{}", probe.name);
        }
    }

    #[test]
    fn ids_stay_unique_within_a_probe() {
        let mut set = set();
        set[0].paraphrased_questions = vec!["Name?".into(), "Who?".into()];
        let others = [sample("y", Some("a7.png"), "?", "Ada Byron")];
        for probe in PROBES {
            let made = made(probe.name, &set, &others).unwrap();
            let ids: BTreeSet<_> = made.iter().map(|sample| &sample.id).collect();
            assert_eq!(ids.len(), made.len(), "{}", probe.name);
        }
    }
}
