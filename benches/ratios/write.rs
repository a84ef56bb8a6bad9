//! (c) Applying a plan to a whole model folder, against copying the folder.
//!
//! `cp` returns when the bytes are in the page cache; `kvw apply` when they are on the disk, checked, under
//! their final name. So there are two baselines: `cp -r`, and `cp -r` followed by syncing the same files. In place,
//! the copy is made before the clock starts. Where the file system shares blocks, `cp --reflink` is a third baseline.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use kvw::bundle::Bundle;
use kvw::edit::{self, EditPlan, ModelIdentity, in_place};
use kvw::kvw::{Plan, load_plan, save_plan};

use crate::forward::Random;
use crate::measure::{Seconds, heading, run_and_watch};

/// Rounds where `KVW_BENCH_ROUNDS` says nothing: a slow disk takes minutes for each.
const ROUNDS: usize = 7;

pub(crate) fn run(model: &Path) -> Result<()> {
    let rounds = match std::env::var("KVW_BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse().context("KVW_BENCH_ROUNDS")?,
        Err(_) => ROUNDS,
    };
    let bundle = Bundle::open(model)?;
    heading(&format!(
        "(c) Edit and write {:.2} GB, against copying the same files on the same disk",
        bundle.tree().bytes() as f64 / 1e9
    ));
    let scratch = tempfile::Builder::new().prefix(".kvw-bench-").tempdir_in(
        bundle
            .tree()
            .canonical_folder()
            .parent()
            .context("a folder beside the model")?,
    )?;
    let plan = scratch.path().join("plan.safetensors");
    let weakened = make_plan(&bundle, &plan)?;
    println!("  {weakened}");
    let out = scratch.path().join("out");
    let mut ways: Vec<Way> = vec![
        Way::new("cp -r", shell("cp -r \"$0\" \"$1\"", model, &out)),
        Way::new(
            "cp -r, then sync of every file",
            shell(
                "cp -r \"$0\" \"$1\" && find \"$1\" -type f -exec sync {} +",
                model,
                &out,
            ),
        ),
        Way::new(
            "edit, write, verify, sync",
            child("apply", &[model, &plan, &out])?,
        ),
        Way {
            copy_first: true,
            ..Way::new(
                "edit in place, verify, sync",
                child("in-place", &[&out, &plan])?,
            )
        },
    ];
    let reflink = shell("cp -r --reflink=always \"$0\" \"$1\"", model, &out);
    let mut tried = shell("cp -r --reflink=always \"$0\" \"$1\" 2>&-", model, &out);
    if tried.status()?.success() {
        ways.push(Way::new("cp -r --reflink=always", reflink));
    }
    // In turn, each round beginning with another way; all data read is in the page cache from round 0 on.
    for round in 0..=rounds {
        for turn in 0..ways.len() {
            let index = (round + turn) % ways.len();
            settle(&out)?;
            if ways[index].copy_first {
                shell("cp -r \"$0\" \"$1\" && sync", model, &out).status()?;
            }
            let (seconds, peak) = run_and_watch(&mut ways[index].command)?;
            if round > 0 {
                ways[index].seconds.add(seconds);
                ways[index].peak = ways[index].peak.max(peak);
            }
        }
    }
    let _ = std::fs::remove_dir_all(&out);
    let [cp, cp_sync] = [&ways[0], &ways[1]].map(|way| way.seconds.median());
    for way in &ways {
        println!(
            "  {:<34} {}  ratio to cp {:.2}, to cp and sync {:.2}  peak {:.0} MB",
            way.name,
            way.seconds,
            way.seconds.median() / cp,
            way.seconds.median() / cp_sync,
            way.peak
        );
    }
    Ok(())
}

struct Way {
    name: &'static str,
    command: Command,
    seconds: Seconds,
    peak: f64,
    /// What it does, it does to a copy.
    copy_first: bool,
}

impl Way {
    fn new(name: &'static str, command: Command) -> Way {
        Way {
            name,
            command,
            seconds: Seconds::default(),
            peak: 0.0,
            copy_first: false,
        }
    }
}

fn shell(script: &str, model: &Path, out: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(model).arg(out);
    command
}

fn child(verb: &str, paths: &[&Path]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["child", verb]).args(paths);
    Ok(command)
}

/// Leaves the disk with nothing to do, and no output.
fn settle(out: &Path) -> Result<()> {
    if out.exists() {
        std::fs::remove_dir_all(out)?;
    }
    Command::new("sync").status()?;
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// A plan with gates in every layer, a third of them 1.
fn make_plan(bundle: &Bundle, path: &Path) -> Result<String> {
    let identity = edit::identity_of(bundle, bundle.components(None)?.decoder)?;
    let mut random = Random(1);
    let mut gates = BTreeMap::new();
    for layer in &identity.layers {
        let layer_gates = (0..layer.d_ff).map(|_| (random.next().abs() * 0.8 + 0.1).min(1.0));
        gates.insert(layer.layer, layer_gates.collect());
    }
    let plan = Plan {
        gates,
        rule: "random".to_owned(),
        parameters: serde_json::Value::Null,
        steps: 1,
    };
    let provenance = serde_json::json!({ "model": identity });
    save_plan(path, &plan, provenance, true)?;
    let edits = EditPlan::new(bundle, &plan.gates, &identity)?;
    let summary = plan.summary();
    Ok(format!(
        "{} of {} neurons weakened in {} layers: {:.0} MB in {} ranges change",
        summary.neurons,
        summary.of_neurons,
        summary.layers,
        edits.bytes() as f64 / 1e6,
        edits.edits().len()
    ))
}

/// What the verb does, from opening the model to the renamed folder.
pub(crate) fn apply_in_child(model: &Path, plan: &Path, out: &Path) -> Result<()> {
    let trace = std::env::var_os("KVW_BENCH_STAGES").is_some();
    let start = Instant::now();
    let (plan, provenance) = load_plan(plan)?;
    let identity: ModelIdentity = serde_json::from_value(provenance["model"].clone())?;
    let bundle = Bundle::open(model)?;
    let edits = EditPlan::new(&bundle, &plan.gates, &identity)?;
    if trace {
        eprintln!("{:7.3} s planned", start.elapsed().as_secs_f64());
    }
    edit::apply(
        &bundle,
        &edits,
        out,
        &edit::Options::default(),
        &|progress| {
            if trace && progress.done == 0 {
                eprintln!(
                    "{:7.3} s {:?}",
                    start.elapsed().as_secs_f64(),
                    progress.stage
                );
            }
        },
    )?;
    if trace {
        eprintln!("{:7.3} s done", start.elapsed().as_secs_f64());
    }
    Ok(())
}

/// The same, where the model lies.
pub(crate) fn in_place_in_child(model: &Path, plan: &Path) -> Result<()> {
    let (plan, provenance) = load_plan(plan)?;
    let identity: ModelIdentity = serde_json::from_value(provenance["model"].clone())?;
    let bundle = Bundle::open(model)?;
    let edits = EditPlan::new(&bundle, &plan.gates, &identity)?;
    let (_, lock) = in_place::preflight(&bundle, &edits, None)?;
    let options = edit::Options::default();
    in_place::prepare(&bundle, &edits, &lock, None, &options, &|_| {})?;
    in_place::resume(model, &lock)?;
    Ok(())
}
