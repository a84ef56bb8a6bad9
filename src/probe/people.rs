//! Other people in the place of those that were forgotten.
//!
//! In: the forget and the retain set, with names. Out: seeded draws of as many other people, and the
//! two sets as they would be if these were to be forgotten. One lucky set of people proves nothing;
//! what a method does to many says how much of its result is luck.

use std::collections::{BTreeMap, BTreeSet};

use super::Error;
use crate::dataset::Sample;
use crate::kvw::{Coefficients, Draws};

/// Draws `draws` times as many people of the retain set as the forget set has. The same seed gives the
/// same people; within a draw nobody comes twice.
///
/// # Errors
/// The forget set has no names, or the retain set not more people than that.
pub fn draw(
    forget: &[Sample],
    retain: &[Sample],
    draws: usize,
    seed: u64,
) -> Result<Vec<BTreeSet<String>>, Error> {
    let names = |samples: &[Sample]| -> BTreeSet<String> {
        samples.iter().filter_map(|s| s.name.clone()).collect()
    };
    let forgotten = names(forget);
    let others: Vec<String> = names(retain).difference(&forgotten).cloned().collect();
    if forgotten.is_empty() || others.len() <= forgotten.len() {
        return Err(Error::TooFewPeople {
            forget: forgotten.len(),
            retain: others.len(),
        });
    }
    let mut stream = Draws::new(seed);
    let drawn = (0..draws).map(|_| {
        let order = stream.permutation(others.len());
        let drawn = order.iter().take(forgotten.len());
        drawn
            .filter_map(|&index| others.get(index).cloned())
            .collect()
    });
    Ok(drawn.collect())
}

/// Both sets as they would be if `people` were to be forgotten: their samples, and everybody else's,
/// in the order in which the files have them.
pub fn split(
    forget: &[Sample],
    retain: &[Sample],
    people: &BTreeSet<String>,
) -> (Vec<Sample>, Vec<Sample>) {
    let all = retain.iter().chain(forget).cloned();
    all.partition(|sample| {
        sample
            .name
            .as_ref()
            .is_some_and(|name| people.contains(name))
    })
}

/// Coefficients by person, so that every choice of people has its retain coefficients without
/// another pass. Sums are exact, so they are those of the pass, to the last bit.
#[derive(Default)]
pub struct ByPerson(BTreeMap<Option<String>, Coefficients>);

impl ByPerson {
    /// Adds what was collected over samples of one person (or of nobody).
    ///
    /// # Errors
    /// See [`Coefficients::merge`].
    pub fn add(&mut self, name: Option<String>, seen: Coefficients) -> Result<(), Error> {
        match self.0.entry(name) {
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(seen);
                Ok(())
            }
            std::collections::btree_map::Entry::Occupied(mut place) => {
                Ok(place.get_mut().merge(&seen)?)
            }
        }
    }

    /// The coefficients over everybody but `people`.
    ///
    /// # Errors
    /// Nobody is left.
    pub fn without(&self, people: &BTreeSet<String>) -> Result<Coefficients, Error> {
        let mut rest = self
            .0
            .iter()
            .filter(|(name, _)| name.as_ref().is_none_or(|name| !people.contains(name)))
            .map(|(_, coefficients)| coefficients);
        let mut whole = rest
            .next()
            .cloned()
            .ok_or(crate::kvw::Error::Empty { set: "retain" })?;
        for coefficients in rest {
            whole.merge(coefficients)?;
        }
        Ok(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(names: &[&str]) -> Vec<Sample> {
        names
            .iter()
            .enumerate()
            .map(|(index, &name)| Sample {
                id: format!("{name}{index}"),
                name: Some(name.into()),
                ..Sample::default()
            })
            .collect()
    }

    #[test]
    fn a_seed_draws_as_many_others_as_are_to_be_forgotten() {
        let forget = samples(&["a", "b", "a"]);
        let retain = samples(&["c", "d", "e", "f", "g", "a"]);
        let draws = draw(&forget, &retain, 20, 1).unwrap();
        assert_eq!(draws, draw(&forget, &retain, 20, 1).unwrap());
        assert_ne!(draws, draw(&forget, &retain, 20, 2).unwrap());
        for people in &draws {
            assert_eq!(people.len(), 2);
            assert!(
                people
                    .iter()
                    .all(|name| !["a", "b"].contains(&name.as_str()))
            );
        }
        let everybody: BTreeSet<_> = draws.iter().flatten().collect();
        assert_eq!(everybody.len(), 5, "twenty draws miss nobody of five");
    }

    #[test]
    fn too_few_people_are_an_error() {
        let forget = samples(&["a", "b"]);
        for retain in [samples(&["c", "d"]), Vec::new()] {
            assert!(matches!(
                draw(&forget, &retain, 1, 0),
                Err(Error::TooFewPeople { .. })
            ));
        }
        assert!(draw(&[Sample::default()], &samples(&["c"]), 1, 0).is_err());
    }

    #[test]
    fn the_split_moves_only_who_was_drawn_and_keeps_the_order() {
        let (forget, retain) = split(
            &samples(&["a", "b"]),
            &samples(&["c", "d", "c", "e"]),
            &BTreeSet::from(["c".to_owned(), "a".to_owned()]),
        );
        let ids = |samples: &[Sample]| -> Vec<String> {
            samples.iter().map(|sample| sample.id.clone()).collect()
        };
        assert_eq!(ids(&forget), ["c0", "c2", "a0"]);
        assert_eq!(ids(&retain), ["d1", "e3", "b1"]);
    }
}
