//! CLEAR and MLLMU-Bench as they lie on disk (`fixtures/benchmarks`, written by Hugging Face's
//! `datasets` in `tools/benchmarks/make.py`), and from there to a verdict.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::Command;

use kvw::dataset::clear::{CAPTION_PROMPTS, NAME_QUESTION};
use kvw::dataset::{Dataset, Error, ImageSource, ReadOptions, Sample, Task, read, read_jsonl};
use kvw::eval::{Evidence, Role, SetKind};
use kvw::kvw::Draws;

fn fixtures(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(path)
}

fn address(benchmark: &str, at: &str) -> PathBuf {
    let folder = fixtures("benchmarks").join(benchmark).join(at);
    format!("{benchmark}:{}", folder.display()).into()
}

fn open(benchmark: &str, at: &str) -> Dataset {
    read(&address(benchmark, at), &ReadOptions::default()).unwrap()
}

fn jsonl(set: &str) -> Vec<Sample> {
    let path = fixtures("demo/data").join(format!("{set}.jsonl"));
    read_jsonl(&path).unwrap().samples
}

fn pixels(sample: &Sample) -> [u8; 32] {
    sample.image.as_ref().unwrap().sha256().unwrap()
}

#[test]
fn clears_captions_are_read_from_all_shards_with_their_images_and_names() {
    let data = open("clear", "forget05");
    let expected = jsonl("forget");
    assert_eq!(data.samples.len(), expected.len());
    for (index, (found, expected)) in data.samples.iter().zip(&expected).enumerate() {
        assert_eq!(found.id, format!("forget05:{index}"));
        assert_eq!(found.answer, expected.answer);
        assert_eq!(found.name, expected.name);
        assert_eq!(found.question, CAPTION_PROMPTS[index % 9]);
        assert_eq!(pixels(found), pixels(expected));
    }
    // The content digest follows the shards.
    let half = fixtures("benchmarks/clear/forget05/train-00000-of-00002.parquet");
    let half = read(
        Path::new(&format!("clear:{}", half.display())),
        &ReadOptions::default(),
    );
    let half = half.unwrap();
    assert_eq!(half.samples.len(), 12);
    assert_ne!(
        half.content_sha256().unwrap(),
        data.content_sha256().unwrap()
    );
}

#[test]
fn clears_perturbed_text_only_and_real_rows_are_told_by_their_columns() {
    let perturbed = open("clear", "forget05_perturbed");
    for sample in &perturbed.samples {
        assert!(
            sample
                .paraphrased_answer
                .as_ref()
                .unwrap()
                .starts_with("The picture is of")
        );
        assert_eq!(sample.perturbed_answers.len(), 3);
        assert!(!sample.perturbed_answers.contains(&sample.answer));
    }
    let tofu = open("clear", "forget05+tofu").samples;
    let (captions, texts): (Vec<_>, Vec<_>) = tofu.iter().partition(|s| s.image.is_some());
    assert_eq!((captions.len(), texts.len()), (6, 6));
    assert!(
        texts
            .iter()
            .all(|s| s.question.ends_with('?') || s.question.ends_with('.'))
    );
    let faces = open("clear", "real_faces").samples;
    for sample in &faces {
        let choice = sample.choice.as_ref().unwrap();
        assert_eq!(sample.question, NAME_QUESTION);
        assert_eq!(choice.options[choice.correct], sample.answer);
        assert_eq!(sample.perturbed_answers.len(), choice.options.len() - 1);
    }
    let world = open("clear", "real_world").samples;
    assert!(
        world
            .iter()
            .all(|s| s.choice.is_some() && s.image.is_some())
    );
    assert_eq!((faces.len(), world.len()), (10, 10));
}

#[test]
fn mllmus_rows_are_asked_by_part() {
    let profiles = open("mllmu", "forget_5").samples;
    assert_eq!(profiles.len(), 3);
    assert_eq!(profiles[0].id, "forget_5:001");
    assert!(
        profiles
            .iter()
            .all(|s| s.image.is_some() && s.task == Task::Open)
    );

    let generation = open("mllmu", "forget_5:generation").samples;
    assert_eq!(generation.len(), 6);
    let text = open("mllmu", "forget_5:generation-text").samples;
    assert!(text.len() == 3 && text.iter().all(|s| s.image.is_none()));

    let cloze = open("mllmu", "retain_95:cloze").samples;
    assert_eq!(cloze.len(), 10);
    for sample in &cloze {
        assert!(sample.question.contains("[Blank]") && !sample.question.contains("__"));
        assert_eq!(sample.task, Task::Cloze);
    }
    let classification = open("mllmu", "forget_5:classification").samples;
    assert_eq!(classification.len(), 6);
    for sample in &classification {
        let choice = sample.choice.as_ref().unwrap();
        assert_eq!((choice.options.len(), choice.correct), (4, 1));
        assert_eq!(sample.task, Task::Choice);
    }
    assert_eq!(
        open("mllmu", "forget_5:classification-image").samples.len(),
        3
    );

    assert_eq!(open("mllmu", "ft_Data").samples.len(), 10);
    let test = open("mllmu", "Test_Set").samples;
    assert_eq!(test.len(), 6);
    assert_ne!(pixels(&test[0]), pixels(&test[1]));

    let error = read(&address("mllmu", "forget_5:essay"), &ReadOptions::default()).unwrap_err();
    assert!(error.to_string().ends_with("found `essay`"), "{error}");
}

#[test]
fn unusable_rows_are_counted_named_and_too_many_are_an_error() {
    // MLLMU-Bench's rows have neither captions nor, in ft_Data, an answer.
    let folder = fixtures("benchmarks/mllmu/ft_Data");
    let as_clear = PathBuf::from(format!("clear:{}", folder.display()));
    let error = read(&as_clear, &ReadOptions { max_bad_rows: 4 }).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("5 unusable rows, more than the 4 allowed"),
        "{text}"
    );
    assert!(
        text.contains("train-00000-of-00001.parquet row 0: expected a caption or an answer"),
        "{text}"
    );
    // All of them allowed, no sample is left.
    let error = read(&as_clear, &ReadOptions { max_bad_rows: 5 }).unwrap_err();
    assert!(matches!(error, Error::Empty { .. }), "{error}");

    // The text-only half of a +tofu set has no image to name.
    let tofu = format!(
        "mllmu:{}",
        fixtures("benchmarks/clear/forget05+tofu").display()
    );
    let error = read(Path::new(&tofu), &ReadOptions::default()).unwrap_err();
    assert!(
        matches!(&error, Error::BadRows { rows, .. } if rows.len() == 12),
        "{error}"
    );
}

/// Who reads the evaluation, the plan or the receipt sees what was not measured.
#[test]
fn rows_that_were_left_out_are_named_in_evaluation_plan_and_receipt() {
    let folder = tempfile::tempdir().unwrap();
    let mixed = folder.path().join("forget");
    std::fs::create_dir(&mixed).unwrap();
    let copy = |from: &str, to: &str| {
        std::fs::copy(fixtures("benchmarks").join(from), mixed.join(to)).unwrap();
    };
    copy(
        "clear/forget05/train-00000-of-00002.parquet",
        "train-00000-of-00002.parquet",
    );
    // Rows with neither a caption nor an answer.
    copy(
        "mllmu/ft_Data/train-00000-of-00001.parquet",
        "train-00001-of-00002.parquet",
    );
    let out = folder.path().join("unlearned");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.arg("unlearn").arg(fixtures("demo/model"));
    command
        .arg("--forget")
        .arg(format!("clear:{}", mixed.display()));
    command.arg("--retain").arg(address("clear", "retain95"));
    command
        .args([
            "--gamma",
            "0.4",
            "--layers",
            "0-2",
            "--eval-limit",
            "2",
            "-o",
        ])
        .arg(&out);
    command.arg("--plan").arg(folder.path().join("forget.plan"));
    let refused = command.output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(
        said.contains("5 unusable rows, more than the 0 allowed"),
        "{said}"
    );

    let run = command.args(["--max-bad-rows", "5"]).output().unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");
    assert_eq!(said.matches("left out:").count(), 5, "{said}");
    let (evidence, _) = Evidence::read(&folder.path().join("unlearned.evaluation.json")).unwrap();
    let left_out = &evidence.set("forget").unwrap().left_out;
    assert_eq!(left_out.len(), 5);
    assert_eq!(left_out[0].file, "train-00001-of-00002.parquet");
    assert_eq!(left_out[4].row, 4);
    assert_eq!(
        left_out[0].problem,
        "expected a caption or an answer, found neither"
    );
    assert!(evidence.set("retain95").unwrap().left_out.is_empty());
    let receipt: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("kvw.json")).unwrap()).unwrap();
    let (_, provenance) = kvw::kvw::load_plan(&folder.path().join("forget.plan")).unwrap();
    for (place, data) in [
        ("receipt", &receipt["plan"]["data"]),
        ("plan", &provenance["data"]),
    ] {
        let rows = data["forget"]["left_out"].as_array();
        assert_eq!(rows.map(Vec::len), Some(5), "{place}: {data}");
        assert!(data["retain"]["left_out"].is_null(), "{place}");
    }
    let of_receipt = &receipt["evaluation"]["sets"][0]["left_out"];
    assert_eq!(of_receipt.as_array().map(Vec::len), Some(5));
}

#[test]
fn a_folder_that_is_not_one_whole_split_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |names: &[&str]| {
        let at = folder.path().join(names.len().to_string());
        std::fs::create_dir(&at).unwrap();
        let whole = fixtures("benchmarks/clear/real_faces/train-00000-of-00001.parquet");
        for name in names {
            std::fs::copy(&whole, at.join(name)).unwrap();
        }
        let address = format!("clear:{}", at.display());
        read(Path::new(&address), &ReadOptions::default())
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&[]).ends_with("expected .parquet files, found none"));
    assert!(
        refused(&["train-00001-of-00002.parquet"])
            .ends_with("expected 2 shards, found 1: number 0 is missing")
    );
    assert!(
        refused(&[
            "train-00000-of-00001.parquet",
            "test-00000-of-00001.parquet"
        ])
        .ends_with("expected one split, found test, train")
    );
    let missing = read(Path::new("clear:/no/such/folder"), &ReadOptions::default()).unwrap_err();
    assert!(matches!(missing, Error::Read { .. }));
}

/// The reader is known to panic on damaged files; here that is an error like any other.
#[test]
fn a_damaged_shard_is_an_error_and_never_a_panic() {
    let whole = std::fs::read(fixtures(
        "benchmarks/clear/forget05/train-00000-of-00002.parquet",
    ));
    let whole = whole.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("train.parquet");
    let address = PathBuf::from(format!("clear:{}", path.display()));
    let mut draws = Draws::new(1);
    let (mut refused, mut read_all) = (0, 0);
    for mutant in 0..300 {
        let mut bytes = whole.clone();
        match mutant % 3 {
            0 => bytes.truncate(draws.below(whole.len())),
            // The footer says what everything else is: most of the damage goes there.
            1 => {
                let place = whole.len() - 1 - draws.below(1500);
                bytes[place] ^= 1 << draws.below(8);
            }
            _ => {
                for _ in 0..8 {
                    let place = draws.below(whole.len());
                    bytes[place] = u8::try_from(draws.below(256)).unwrap();
                }
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        match read(&address, &ReadOptions { max_bad_rows: 12 }) {
            Ok(data) => {
                assert!(data.samples.len() <= 12);
                read_all += 1;
            }
            Err(error) => {
                assert!(error.to_string().contains("train.parquet"), "{error}");
                refused += 1;
            }
        }
    }
    println!("{refused} refused, {read_all} read");
    assert!(refused >= 150);
}

#[test]
fn image_bytes_of_a_dataset_are_prepared_like_a_file() {
    let family = kvw::preprocess::open_family(&fixtures("demo/model")).unwrap();
    let (held, file) = (&open("clear", "forget05").samples[0], &jsonl("forget")[0]);
    assert!(matches!(held.image, Some(ImageSource::Bytes { .. })));
    let file = Sample {
        question: held.question.clone(),
        ..file.clone()
    };
    let form = kvw::preprocess::Form::WithAnswer;
    let (held, file) = (family.prepare(held, form), family.prepare(&file, form));
    assert_eq!(held.unwrap().image, file.unwrap().image);
}

/// From parquet to a verdict: CLEAR's forget and retain sets, evaluated on both benchmarks' parts.
#[test]
fn a_model_is_unlearned_and_judged_from_parquet_alone() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("unlearned");
    let set = |kind: &str, benchmark: &str, at: &str| {
        format!("--eval={kind}={}", address(benchmark, at).display())
    };
    let run = Command::new(env!("CARGO_BIN_EXE_kvw"))
        .arg("unlearn")
        .arg(fixtures("demo/model"))
        .arg("--forget")
        .arg(address("clear", "forget05"))
        .arg("--retain")
        .arg(address("clear", "retain95"))
        .args(["--gamma", "0.4", "--layers", "0-2", "--eval-limit", "6"])
        .arg(set("forget", "clear", "forget05_perturbed"))
        .arg(set("other", "clear", "real_faces"))
        .arg(set("forget", "mllmu", "forget_5:cloze"))
        .arg(set("retain", "mllmu", "retain_95:classification"))
        .arg("-o")
        .arg(&out)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");
    let evidence = folder.path().join("unlearned.evaluation.json");
    let (evidence, _) = Evidence::read(&evidence).unwrap();
    let names: Vec<&str> = evidence.sets.iter().map(|set| set.set.as_str()).collect();
    assert_eq!(
        names,
        [
            "forget05",
            "retain95",
            "forget05_perturbed",
            "real_faces",
            "forget_5:cloze",
            "retain_95:classification"
        ]
    );
    let value = |set: &str, role: Role, metric: &str| {
        evidence.set(set).unwrap().models[&role]
            .summary
            .value(metric)
    };
    // The demo's model knows every caption before; after, the forgotten names are gone.
    assert_eq!(value("forget05", Role::Before, "name_accuracy"), Some(1.0));
    assert!(value("forget05", Role::After, "name_accuracy").unwrap() < 0.5);
    assert!(value("retain95", Role::After, "name_accuracy").unwrap() > 0.5);
    // Wrong names were impossible before, and are not any more.
    let ratio = |role| value("forget05_perturbed", role, "truth_ratio").unwrap();
    assert!(ratio(Role::Before) < ratio(Role::After));
    for (set, metric) in [
        ("real_faces", "choice_accuracy"),
        ("real_faces", "probability_normalized"),
        ("forget_5:cloze", "cloze_accuracy"),
        ("retain_95:classification", "choice_accuracy"),
    ] {
        assert!(value(set, Role::Before, metric).is_some(), "{set} {metric}");
    }
    let classification = &evidence.set("retain_95:classification").unwrap().models[&Role::After];
    assert!(classification.answers[0].answered.prediction.is_none());
    let loss = classification.summary.get("rouge_l_recall").unwrap();
    assert!(loss.value.is_none() && loss.reason.is_some());
    assert_eq!(evidence.set("forget05").unwrap().kind, SetKind::Forget);
}
