//! Models are fitted to links that cost what two GPUs were measured to cost: the choices must be those of the figures.

use super::*;
use crate::abi::hkv_copy;
use crate::movement::{Planner, Route, Traffic};

/// A link on paper.
struct Paper {
    /// GB/s of the kernel at every size, by way and quota: `bench movement` of an H100 and an H200, rows at random places
    /// of a gigabyte.
    kernels: [[[f64; 8]; 3]; 2],
    /// GB/s of the copy engines.
    engine: f64,
    /// What fewer GB/s are left of either while the other direction is busy.
    busy: f64,
}

const H100: Paper = Paper {
    kernels: [
        [
            [25.0, 44.0, 49.0, 50.0, 50.4, 50.6, 50.7, 50.5],
            [25.3, 49.3, 49.7, 50.8, 50.5, 50.8, 50.8, 50.9],
            [26.5, 50.1, 50.5, 50.7, 50.6, 50.9, 50.8, 50.9],
        ],
        [
            [23.6, 34.2, 42.3, 51.7, 52.2, 52.2, 52.1, 52.0],
            [25.0, 48.5, 51.8, 52.2, 52.2, 52.2, 51.8, 52.1],
            [26.1, 50.8, 51.8, 52.1, 52.3, 52.3, 52.2, 52.3],
        ],
    ],
    engine: 54.8,
    busy: 0.75,
};

const H200: Paper = Paper {
    kernels: [
        [
            [24.0, 44.3, 49.9, 50.9, 51.1, 51.2, 51.3, 51.3],
            [23.7, 46.8, 50.8, 51.2, 51.3, 51.3, 51.3, 51.3],
            [25.7, 49.9, 51.1, 51.3, 51.3, 51.3, 51.3, 51.3],
        ],
        [
            [22.9, 30.9, 38.8, 51.6, 52.4, 52.4, 52.4, 52.4],
            [23.8, 48.7, 52.3, 52.4, 52.5, 52.5, 52.4, 52.4],
            [25.6, 51.0, 51.3, 52.5, 52.5, 52.5, 52.5, 52.5],
        ],
    ],
    engine: 55.5,
    busy: 0.9,
};

/// Microseconds of a launch, of a batch, of a copy's submission, and of the engine between two copies.
const LAUNCH: f64 = 9.0;
const BATCH: f64 = 3.5;
const SUBMIT: f64 = 0.6;
const BETWEEN: f64 = 0.12;

impl Paper {
    fn rows(&self, way: Way, ctas: u32) -> SizeCosts {
        let way = match way {
            Way::HostToDevice => 0,
            Way::DeviceToHost => 1,
            Way::Inside => return SizeCosts::at_rate(0.004, 40.0 * f64::from(ctas)),
        };
        let quota = QUOTAS.iter().position(|&quota| quota == ctas).unwrap();
        let rates = SizeCosts::SIZES.into_iter().zip(self.kernels[way][quota]);
        let us: Vec<(u64, f64)> =
            rates.map(|(bytes, gbps)| (bytes, bytes as f64 / gbps / 1e3)).collect();
        SizeCosts::measured(|bytes| Ok(us.iter().find(|(size, _)| *size == bytes).unwrap().1))
            .unwrap()
    }

    fn rate_left(&self, busy: bool) -> f64 {
        if busy { self.busy } else { 1.0 }
    }
}

impl Timed for Paper {
    fn batches(
        &mut self,
        way: Way,
        busy: bool,
        count: u64,
        copies: u64,
        bytes: u64,
    ) -> Result<f64> {
        let rate = if way == Way::Inside { 1500.0 } else { self.engine } * self.rate_left(busy);
        let (mut submitted, mut done) = (0.0f64, 0.0f64);
        for _ in 0..count {
            submitted += BATCH + copies as f64 * SUBMIT;
            done = done.max(submitted) + copies as f64 * (BETWEEN + bytes as f64 / rate / 1e3);
        }
        Ok(done)
    }

    fn pitched(&mut self, _way: Way, rows: u64, bytes: u64) -> Result<f64> {
        Ok(9.0 + rows as f64 * 0.003 + (rows * bytes) as f64 / self.engine / 1e3)
    }

    fn kernel(&mut self, way: Way, busy: bool, ctas: u32, rows: u64, bytes: u64) -> Result<f64> {
        let row = self.rows(way, ctas).us(bytes) / self.rate_left(busy);
        Ok(LAUNCH + rows as f64 * row)
    }
}

const WAYS: [Way; 2] = [Way::HostToDevice, Way::DeviceToHost];

fn alone(way: Way) -> Traffic {
    Traffic { way, both_ways: false }
}

#[test]
fn every_size_gets_as_few_ctas_as_are_as_fast_as_more() {
    for mut paper in [H100, H200] {
        let model = fit(&mut paper, 132).unwrap();
        for (w, way) in WAYS.into_iter().enumerate() {
            for (size, bytes) in SizeCosts::SIZES.into_iter().enumerate() {
                let ctas = model.quota(alone(way), 1 << 16, bytes << 16);
                let rates = paper.kernels[w].map(|rates| rates[size]);
                let rate = |ctas: u32| rates[QUOTAS.iter().position(|&q| q == ctas).unwrap()];
                let best = rates.into_iter().fold(0.0, f64::max);
                assert!(1.1 * rate(ctas) > best, "{way:?} {bytes}: {ctas} CTAs of {rates:?}");
                for fewer in QUOTAS.into_iter().filter(|&fewer| fewer < ctas) {
                    assert!(1.04 * rate(fewer) < rate(ctas), "{way:?} {bytes}: {ctas} CTAs");
                }
            }
        }
        // What one cost per row and one rate got wrong: rows that are neither short nor long.
        let quota = |way, bytes: u64| model.quota(alone(way), 1 << 16, bytes << 16);
        assert_eq!(WAYS.map(|way| quota(way, 1 << 10)), [4, 8]);
        assert_eq!(WAYS.map(|way| quota(way, 4 << 10)), [4, 4]);
        assert!(quota(Way::DeviceToHost, 512) > 4);
    }
}

#[test]
fn costs_are_those_of_the_link() {
    let mut paper = H100;
    let model = fit(&mut paper, 132).unwrap();
    let near = |a: f64, b: f64| (a - b).abs() < 0.03 * b;
    for (way, paths) in WAYS.into_iter().zip([&model.to_device[0], &model.to_host[0]]) {
        let engine = paths.engine.unwrap();
        assert!(near(engine.submit_us, SUBMIT + BETWEEN), "{engine:?}");
        // Small copies wait for the host, large ones for the link; neither waits for both.
        let host = SUBMIT + BATCH / IN_A_BATCH as f64;
        assert!(near(engine.copies.us(1024), host), "{engine:?}");
        let large = BETWEEN + (1 << 20) as f64 / paper.engine / 1e3;
        assert!(near(engine.copies.us(1 << 20), large), "{engine:?}");
        for kernel in &paths.kernels {
            let expected = paper.rows(way, kernel.ctas);
            assert!(near(kernel.rows.us(1000), expected.us(1000)), "{kernel:?}");
            assert!(near(kernel.start_us, LAUNCH), "{kernel:?}");
        }
    }
    let busy = model.to_host[1].engine.unwrap().copies.gbps();
    assert!(busy < 0.8 * paper.engine, "{busy}");
}

/// Many blocks of 96 KiB go by the copy engines, which are faster once they run; few by the kernel, which begins at once.
#[test]
fn blocks_go_by_the_engines_when_there_are_many() {
    for mut paper in [H100, H200] {
        let model = fit(&mut paper, 132).unwrap();
        let by_kernel = |count: u64, bytes: u64| {
            let place = |i: u64, step: u64| ((i * step) % count * 2 * bytes) as usize;
            let mut copies: Vec<hkv_copy> = (0..count)
                .map(|i| hkv_copy {
                    src: place(i, 7) as *const _,
                    dst: place(i, 5) as *mut _,
                    bytes,
                })
                .collect();
            let traffic = alone(Way::HostToDevice);
            let shape = &MoveShape::FRAGMENTS;
            match Planner::default().plan(&mut copies, shape, traffic, &model, &[]) {
                Route::Direct { copies, .. } => copies as u64,
                route => panic!("{route:?}"),
            }
        };
        assert_eq!(by_kernel(5461, 96 << 10), 0);
        assert_eq!(by_kernel(20, 96 << 10), 20);
        assert_eq!(by_kernel(5461, 4 << 10), 5461);
        assert_eq!(by_kernel(512, 1 << 20), 0);
    }
}
