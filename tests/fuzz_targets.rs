//! Every fuzz target on some inputs of its own: random bytes, and its seeds with random damage. What fuzzing for
//! hours found stays found, and the targets keep compiling.

#[path = "../fuzz/targets.rs"]
mod targets;

const RUNS: usize = 300;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
}

#[test]
fn targets_run_clean() {
    for (name, target, seeds) in targets::TARGETS {
        let mut random = Random(name.len() as u64);
        for seed in seeds {
            target(seed);
        }
        for run in 0..RUNS {
            let mut data: Vec<u8> = match seeds {
                [] => {
                    let most = 2 << random.below(10);
                    let len = random.below(most);
                    (0..len).map(|_| random.next() as u8).collect()
                }
                seeds => seeds[run % seeds.len()].to_vec(),
            };
            for _ in 0..random.below(4) {
                if !data.is_empty() {
                    let at = random.below(data.len());
                    match random.below(3) {
                        0 => data[at] = random.next() as u8,
                        1 => data.truncate(at),
                        _ => data[at] ^= 1 << random.below(8),
                    }
                }
            }
            target(&data);
        }
    }
}
