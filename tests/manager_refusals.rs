//! Bad input: what is refused has never been.
//!
//! Two of a kind live through the same random calls, good ones and bad ones, but the second is spared those that
//! the first refused. A refusal gives a reason that holds, by a model of what callers know; and at every moment
//! all that can be seen of the two, all answers to come included, is the same: any trace that a refused call left,
//! seen at once or not, would set them apart. Every public method takes part, which is checked against the source.

#[path = "manager_refusals/configs.rs"]
mod configs;
#[path = "manager_refusals/inputs.rs"]
mod inputs;
#[path = "manager_refusals/known.rs"]
mod known;
#[path = "manager_refusals/methods.rs"]
mod methods;
#[path = "manager_refusals/ranks.rs"]
mod ranks;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Debug;
use std::path::Path;

use hybridkv::Error;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

/// Why a call may be refused, as names of [`hybridkv::ErrorKind`]s.
#[derive(Default)]
struct Reasons {
    /// If any, it must be refused.
    certain: Vec<&'static str>,
    /// It may be refused with one of these in any case, for a reason that its caller cannot know.
    possible: Vec<&'static str>,
}

impl Reasons {
    fn when(mut self, holds: bool, kind: &'static str) -> Self {
        self.certain.extend(holds.then_some(kind));
        self
    }

    fn or(mut self, kinds: &[&'static str]) -> Self {
        self.possible.extend(kinds);
        self
    }
}

fn never() -> Reasons {
    Reasons::default()
}

fn when(holds: bool, kind: &'static str) -> Reasons {
    never().when(holds, kind)
}

/// What is under test, and what its caller knows of it.
trait Subject {
    /// Arguments before and after they are made to fit what is known.
    type Raw: Debug;
    type Args: Debug;

    fn resolve(&self, raw: &Self::Raw) -> Self::Args;

    /// Whether a refusal begins something all the same, as is documented.
    fn begins_by(&self, error: &Error) -> bool;

    /// What its caller does after every call, and what that gave.
    fn follow_up(&mut self) -> String;

    /// All that can be seen of it, counters of refusals apart.
    fn seen(&mut self) -> String;
}

/// A public method: how often and how it is called, and when it may be refused.
struct Method<S: Subject> {
    name: &'static str,
    weight: u32,
    call: fn(&mut S, &S::Args) -> Result<String, Error>,
    reasons: fn(&S, &S::Args) -> Reasons,
}

fn show<T: Debug>(answer: Result<T, Error>) -> Result<String, Error> {
    answer.map(|answer| format!("{answer:?}"))
}

fn kind_of(error: &Error) -> String {
    let kind = format!("{:?}", error.kind());
    kind.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// Calls of a method that were accepted and refused.
type Tally = Vec<(usize, usize)>;

fn live_through<S: Subject>(
    methods: &[Method<S>],
    (mut first, mut spared): (S, S),
    calls: &[(usize, S::Raw)],
    tally: &mut Tally,
) -> Result<(), TestCaseError> {
    for (at, raw) in calls {
        let method = &methods[*at];
        let args = first.resolve(raw);
        let Reasons { certain, possible } = (method.reasons)(&first, &args);
        let called = || format!("{} {args:?}", method.name);
        match (method.call)(&mut first, &args) {
            Ok(answer) => {
                prop_assert!(certain.is_empty(), "{} accepted, not {certain:?}", called());
                let other = (method.call)(&mut spared, &args);
                prop_assert_eq!(other.ok(), Some(answer), "{}", called());
                tally[*at].0 += 1;
            }
            Err(error) => {
                let kind = kind_of(&error);
                let reasons = [certain, possible].concat();
                prop_assert!(reasons.contains(&&*kind), "{}: {error}, not {reasons:?}", called());
                if first.begins_by(&error) {
                    let other = (method.call)(&mut spared, &args).map_err(|e| e.to_string());
                    prop_assert_eq!(other, Err(error.to_string()), "{}", called());
                }
                tally[*at].1 += 1;
            }
        }
        prop_assert_eq!(first.follow_up(), spared.follow_up(), "{}", called());
        prop_assert_eq!(first.seen(), spared.seen(), "{}", called());
    }
    Ok(())
}

/// Random lives of subjects that `make` makes of configurations; `refusable` are the methods that can be refused at
/// all: each of them must have been, and accepted, too.
fn what_is_refused_has_never_been<S: Subject, C: Debug>(
    methods: &[Method<S>],
    configs: impl Strategy<Value = C>,
    raws: impl Strategy<Value = S::Raw> + Clone,
    make: impl Fn(&C) -> S,
    refusable: &[&str],
) {
    let pick = methods.iter().enumerate().map(|(at, method)| (method.weight, Just(at).boxed()));
    let pick = proptest::strategy::Union::new_weighted(pick.collect());
    let calls = prop::collection::vec((pick, raws), 1..500);
    let tally = RefCell::new(vec![(0, 0); methods.len()]);
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 300,
        rng_seed: RngSeed::Fixed(1),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    });
    let result = runner.run(&(configs, calls), |(config, calls)| {
        live_through(methods, (make(&config), make(&config)), &calls, &mut tally.borrow_mut())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    for (method, (accepted, refused)) in methods.iter().zip(tally.into_inner()) {
        let name = method.name;
        assert!(accepted > 10, "{name} was accepted {accepted} times only");
        assert_eq!(refused > 10, refusable.contains(&name), "{name} was refused {refused} times");
    }
}

/// Checks that the table names every public method of a type of the manager, and nothing else.
fn all_are_named<S: Subject>(of: &str, methods: &[Method<S>]) {
    let named: BTreeSet<String> = methods.iter().map(|method| method.name.to_owned()).collect();
    let mut found = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src/manager")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let mut inside = false;
            for line in text.lines() {
                match line {
                    _ if line == format!("impl {of} {{") => inside = true,
                    "}" => inside = false,
                    _ => {}
                }
                if inside && let Some(signature) = line.strip_prefix("    pub ") {
                    let name = signature.split_once("fn ").map(|(_, rest)| rest);
                    let end = |c: char| !c.is_alphanumeric() && c != '_';
                    found.extend(name.and_then(|name| name.split(end).next()).map(str::to_owned));
                }
            }
        }
    }
    assert_eq!(named, found, "the table of {of}'s methods and the source differ");
}
