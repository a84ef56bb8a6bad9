//! What a report does not show, said in it.

use super::Subject;
use crate::eval::Role;

/// The limits that hold for what was measured here.
pub(super) fn of(subject: &Subject<'_>) -> Vec<String> {
    let mut limits = vec![
        "Weakening is not proof of erasure. The numbers say what the model answered on these sets, to \
         these questions, with greedy decoding. What it holds inside may come back by other questions, \
         by fine-tuning, or from its hidden states."
            .to_owned(),
        "A plan (the gates) and the unlearned model together are the original model. Whoever has the \
         original can compute the gates from the difference."
            .to_owned(),
    ];
    match subject.evidence {
        None => {
            limits.push("No evaluation was given: nothing is said about what is forgotten.".into())
        }
        Some(evidence) => {
            let few: Vec<&str> = evidence
                .sets
                .iter()
                .filter(|set| set.samples < 30)
                .map(|set| set.set.as_str())
                .collect();
            if !few.is_empty() {
                limits.push(format!(
                    "Few samples make wide intervals: fewer than 30 in {}.",
                    few.join(", ")
                ));
            }
            let retrained = evidence
                .sets
                .iter()
                .any(|set| set.models.contains_key(&Role::Retrained));
            if !retrained {
                limits.push(
                    "No retrained model was evaluated: nobody knows here what a model that never saw the \
                     forget set would answer."
                        .into(),
                );
            }
            if evidence.comparisons.is_empty() {
                limits.push(
                    "No comparison of sets or models (membership, forget quality) was made.".into(),
                );
            }
        }
    }
    if subject.probes.is_none() {
        limits.push(
            "No probes were given (`kvw probe`): nobody knows here what other questions, other images or \
             hints would bring back."
                .into(),
        );
    }
    if subject.plan.is_none() {
        limits.push("The plan was not given: the gates are not shown.".into());
    }
    if subject.samples == 0 {
        limits.push("Samples were left out of this report on purpose.".into());
    } else {
        limits.push(
            "This report names what was forgotten. Keep it as you keep the evaluation, or make it without \
             samples."
                .into(),
        );
    }
    limits
}
