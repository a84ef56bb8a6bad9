//! The rules by name, each made of named numbers.
//!
//! In: a rule's name and its parameters. Out: the [`Rule`]. This is how what chooses parameters (a
//! sweep, say) needs to know no rule: a new rule is its implementation and one line in [`RULES`].

use std::collections::BTreeMap;

use super::{Error, KnowledgeVectorWeakening, Rule};

/// A rule's parameters by name.
pub type Parameters = BTreeMap<String, f64>;

/// A kind of rule: what it is called, which parameters it takes, how one is made.
pub struct RuleKind {
    /// As in [`Rule::name`].
    pub name: &'static str,
    /// The parameters that it takes, all of them required.
    pub parameters: &'static [&'static str],
    make: fn(&Parameters) -> Result<Box<dyn Rule>, Error>,
}

/// Every rule.
pub static RULES: &[RuleKind] = &[RuleKind {
    name: KnowledgeVectorWeakening::NAME,
    parameters: &[KnowledgeVectorWeakening::GAMMA],
    make: |parameters| {
        let gamma = parameters.get(KnowledgeVectorWeakening::GAMMA).copied();
        Ok(Box::new(KnowledgeVectorWeakening::new(
            gamma.unwrap_or_default(),
        )?))
    },
}];

impl RuleKind {
    /// The rule called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<&'static RuleKind, Error> {
        let found = RULES.iter().find(|rule| rule.name == name);
        found.ok_or_else(|| Error::NoSuchRule {
            name: name.to_owned(),
            known: RULES.iter().map(|rule| rule.name).collect::<Vec<_>>(),
        })
    }

    /// The rule with these parameters.
    ///
    /// # Errors
    /// A parameter is missing, unknown or out of its range.
    pub fn make(&self, parameters: &Parameters) -> Result<Box<dyn Rule>, Error> {
        if !parameters.keys().eq(self.parameters) {
            return Err(Error::Parameters {
                rule: self.name,
                expected: self.parameters.join(", "),
                found: parameters.keys().cloned().collect::<Vec<_>>().join(", "),
            });
        }
        (self.make)(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::{Parameters, RULES, RuleKind};
    use crate::kvw::Error;

    #[test]
    fn every_rule_can_be_made_and_names_itself_and_its_parameters() {
        for kind in RULES {
            assert!(kind.parameters.is_sorted(), "compared with a map's keys");
            let parameters: Parameters = kind
                .parameters
                .iter()
                .map(|&name| (name.to_owned(), 0.5))
                .collect();
            let rule = RuleKind::named(kind.name)
                .and_then(|kind| kind.make(&parameters))
                .unwrap();
            assert_eq!(rule.name(), kind.name);
            assert_eq!(rule.parameters(), serde_json::json!(parameters));
        }
    }

    #[test]
    fn wrong_names_and_values_are_refused() {
        assert!(matches!(
            RuleKind::named("retrain"),
            Err(Error::NoSuchRule { .. })
        ));
        let kind = RuleKind::named("kvw").unwrap();
        let of = |name: &str, value| Parameters::from([(name.to_owned(), value)]);
        for parameters in [Parameters::new(), of("beta", 1.0)] {
            assert!(matches!(
                kind.make(&parameters),
                Err(Error::Parameters { .. })
            ));
        }
        for gamma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(
                kind.make(&of("gamma", gamma)),
                Err(Error::Option { .. })
            ));
        }
    }
}
