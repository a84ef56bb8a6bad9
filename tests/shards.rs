//! A retain set in parts, and again after a kill, gives the bytes of one run over all of it.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use kvw::bundle::Bundle;
use kvw::dataset::{Sample, read_jsonl};
use kvw::graph::Outputs;
use kvw::kvw::{
    KnowledgeVectorWeakening, LayerRange, Rule as _, Shard, load_part, merge, save_coefficients,
};
use kvw::pipeline::Model;
use kvw::pipeline::collect::{Collected, Job};
use kvw::runtime::Decoder;
use support::{engine, fixtures};

const RULE: KnowledgeVectorWeakening = KnowledgeVectorWeakening { gamma: 1.0 };
const DATA: &str = "demo/data/retain.jsonl";

/// Runs one job on an open model.
fn collect(
    (model, decoder): (&mut Model<'_>, &mut Decoder),
    samples: &[Sample],
    batch_size: usize,
    shard: Option<Shard>,
    output: &Path,
) -> Collected {
    let job = Job {
        samples,
        rule: &RULE,
        batch_size,
        shard,
        provenance: serde_json::json!({"data": samples.len()}),
        output,
        force: false,
        checkpoint: None,
    };
    job.run(model, decoder, |_| {}).unwrap()
}

#[test]
fn any_number_of_parts_in_any_order_gives_the_bytes_of_one_run() {
    let engine = engine(1);
    let bundle = Bundle::open(&fixtures().join("demo/model")).unwrap();
    let data = read_jsonl(&fixtures().join(DATA)).unwrap();
    let samples = &data.samples[..21];
    let mut model = Model::open(&bundle, None, &engine, samples.len()).unwrap();
    let outputs = Outputs::Sums(RULE.moment());
    let mut decoder = model
        .decoder(LayerRange::All, outputs, samples.len())
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    for batch_size in [1, 2] {
        let whole = folder.path().join(format!("whole-{batch_size}"));
        collect(
            (&mut model, &mut decoder),
            samples,
            batch_size,
            None,
            &whole,
        );
        let whole = fs::read(whole).unwrap();
        for count in [1, 2, 3, 7, 16, 64] {
            let parts = folder.path().join(format!("{batch_size}-{count}"));
            // From the last one to the first: nothing depends on the order of work either.
            let files = (0..count).rev().map(|index| {
                let shard = Some(Shard::new(index, count).unwrap());
                collect(
                    (&mut model, &mut decoder),
                    samples,
                    batch_size,
                    shard,
                    &parts,
                )
                .output
            });
            let mut files: Vec<PathBuf> = files.collect();
            files.rotate_left(count / 3);
            let parts = files.iter().map(|file| load_part(file).unwrap()).collect();
            let (coefficients, provenance) = merge(parts).unwrap();
            let merged = folder.path().join(format!("merged-{batch_size}-{count}"));
            save_coefficients(&merged, &coefficients, provenance, false).unwrap();
            assert!(
                fs::read(merged).unwrap() == whole,
                "{count} parts, batches of {batch_size}"
            );
        }
    }
}

/// `kvw` with one thread, in `folder`.
fn kvw(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvw"));
    command.current_dir(folder).stderr(Stdio::piped());
    command.env("ORT_DYLIB_PATH", &engine(1).library().path);
    command
}

fn collect_command(folder: &Path, data: &Path, output: &str) -> Command {
    let mut command = kvw(folder);
    command.arg("collect").arg(fixtures().join("demo/model"));
    command.arg("--data").arg(data).args(["-o", output]);
    command.args(["--threads", "1", "--layers", "0-1"]);
    command
}

#[track_caller]
fn run(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{stderr}");
    match code {
        0 => String::from_utf8(output.stdout).unwrap(),
        _ => stderr,
    }
}

/// The first `count` rows of the demo's retain set, `times` times over, as a file of its own.
fn rows(folder: &Path, count: usize, times: usize) -> PathBuf {
    let text = fs::read_to_string(fixtures().join(DATA)).unwrap();
    let rows = text.lines().take(count).map(|line| {
        let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
        let image = row["image"].as_str().unwrap();
        row["image"] = serde_json::json!(fixtures().join("demo/data").join(image));
        row.as_object_mut().unwrap().remove("id");
        format!("{row}\n")
    });
    let rows: String = rows.collect();
    let path = folder.join("rows.jsonl");
    fs::write(&path, rows.repeat(times)).unwrap();
    path
}

#[test]
fn parts_of_several_processes_are_merged_and_what_is_no_whole_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let data = rows(folder, 7, 1);
    let shard = |part: &str| {
        let mut command = collect_command(folder, &data, "parts");
        command.args(["--shard", part]);
        command
    };
    run(&mut collect_command(folder, &data, "whole.kc"), 0);
    for part in ["2/3", "0/3"] {
        run(&mut shard(part), 0);
    }
    let parts = || -> Vec<PathBuf> {
        let files = fs::read_dir(folder.join("parts")).unwrap();
        let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        files.sort();
        files
    };
    let merge = |files: &[PathBuf], output: &str| {
        let mut command = kvw(folder);
        command.arg("merge").args(files).args(["-o", output]);
        command
    };
    let error = run(&mut merge(&parts(), "merged.kc"), 2);
    assert!(
        error.contains("begins at sample 2") && error.contains("samples 4..7"),
        "{error}"
    );
    assert!(!folder.join("merged.kc").exists());

    let mut from_slurm = shard("auto");
    from_slurm.envs([
        ("SLURM_ARRAY_TASK_ID", "11"),
        ("SLURM_ARRAY_TASK_MIN", "10"),
    ]);
    run(from_slurm.env("SLURM_ARRAY_TASK_COUNT", "3"), 0);
    let before = fs::read(&parts()[1]).unwrap();
    let again = run(&mut shard("1/3"), 0);
    assert!(again.contains("there already"), "{again}");
    assert!(before == fs::read(&parts()[1]).unwrap());

    let mut mixed = parts();
    mixed.reverse();
    run(&mut merge(&mixed, "merged.kc"), 0);
    let [merged, whole] =
        ["merged.kc", "whole.kc"].map(|name| fs::read(folder.join(name)).unwrap());
    assert!(merged == whole);

    mixed.push(mixed[0].clone());
    let error = run(&mut merge(&mixed, "again.kc"), 2);
    assert!(error.contains("begins at sample 7"), "{error}");
    run(shard("0/3").args(["--batch-size", "2"]), 0);
    assert_eq!(parts().len(), 4, "another batch size is another job");
    let error = run(&mut merge(&parts(), "foreign.kc"), 2);
    assert!(error.contains("a part of job"), "{error}");

    let mut weaken = kvw(folder);
    weaken.arg("weaken").arg(fixtures().join("demo/model"));
    weaken
        .arg("--forget")
        .arg(&data)
        .arg("--retain-coefficients");
    weaken.arg(&mixed[0]).args(["-o", "plan"]);
    let error = run(&mut weaken, 2);
    assert!(
        error.contains("all 7 samples") && error.contains("kvw merge"),
        "{error}"
    );
}

#[test]
fn a_killed_run_goes_on_at_its_checkpoint_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    // Takes some seconds, a checkpoint is due after one.
    let data = rows(folder, 296, 4);
    run(&mut collect_command(folder, &data, "whole.kc"), 0);
    let mut command = collect_command(folder, &data, "killed.kc");
    command.args(["--checkpoint", "1"]).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let checkpoint = folder.join("killed.kc.checkpoint");
    let start = Instant::now();
    while !checkpoint.exists() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "ended without a checkpoint"
        );
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint");
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!folder.join("killed.kc").exists());
    let again = run(&mut collect_command(folder, &data, "killed.kc"), 0);
    assert!(again.contains("by an earlier run"), "{again}");
    let [killed, whole] =
        ["killed.kc", "whole.kc"].map(|name| fs::read(folder.join(name)).unwrap());
    assert!(killed == whole);
    assert!(!checkpoint.exists());
}
