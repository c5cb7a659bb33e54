//! Buckets and pairs against plain loops over all rows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use safetensors::tensor::Dtype;

use super::coactivation::tiles;
use super::columns::Columns;
use super::page::Pages;
use super::partners::Partners;
use super::place::{position_bin, POSITION_BINS, SEGMENTS};
use super::spill::STRETCH;
use super::*;
use crate::examples::histogram::{bin_of, BINS};
use crate::examples::samples::Ranking;
use crate::examples::{sum, ShardFile};
use crate::shard::order::{mix, GOLDEN};
use crate::shard::write::{write_shard, Tensor};
use crate::{Cancel, Error};

#[derive(Debug, Clone)]
struct World {
    d_sae: usize,
    /// Of each row its features and strengths, which may be zero.
    rows: Vec<BTreeMap<u32, f32>>,
    places: Vec<Place>,
}

fn world() -> impl Strategy<Value = World> {
    (1_usize..9, 0_usize..60).prop_flat_map(|(d_sae, rows)| {
        // Few strengths, so that many are equal.
        let strength = prop::sample::select(vec![0.0, 0.25, 0.5, 1.0, 3.5, 1e-7, 1e7]);
        let row = prop::collection::btree_map(0..d_sae as u32, strength, 0..=d_sae);
        // A text ends, a place is left out, a segment ends; the token.
        let step = (0..6_u32, 0..5_i32, 0..4_u32);
        let rows = prop::collection::vec((row, step), rows);
        rows.prop_map(move |rows| {
            let (mut sequence, mut position) = (0_i64, 0);
            let mut places: Vec<Place> = Vec::new();
            for (_, (what, token, segment)) in &rows {
                let before = match what {
                    0 => {
                        (sequence, position) = (sequence + 3, *token);
                        false
                    }
                    1 => {
                        position += 2;
                        false
                    }
                    _ => {
                        position += 1;
                        places
                            .last()
                            .is_some_and(|last| last.sequence() == sequence)
                    }
                };
                if before {
                    let last = places.pop().unwrap();
                    let had_before = last.follows();
                    let segment = last.segment() as u32;
                    places.push(Place::new(
                        sequence,
                        last.position,
                        last.token,
                        segment,
                        had_before,
                        true,
                    ));
                }
                places.push(Place::new(
                    sequence, position, *token, *segment, before, false,
                ));
            }
            World {
                d_sae,
                rows: rows.into_iter().map(|(row, _)| row).collect(),
                places,
            }
        })
    })
}

impl World {
    /// Writes shards of at most `size` rows.
    fn write(&self, folder: &Path, size: usize) -> Vec<ShardFile> {
        let mut files = Vec::new();
        for (part, rows) in self.rows.chunks(size).enumerate() {
            let path = folder.join(format!("{part}.safetensors"));
            write_codes(&path, rows);
            files.push(ShardFile {
                path,
                first_row: (part * size) as i64,
                rows: rows.len(),
            });
        }
        files
    }

    /// Row and strength of each activation of a feature, in the order of rows.
    fn active(&self, feature: usize) -> Vec<(usize, f32)> {
        let strength = |row: &BTreeMap<u32, f32>| row.get(&(feature as u32)).copied();
        let all = self.rows.iter().enumerate();
        all.filter_map(|(at, row)| Some((at, strength(row)?)))
            .filter(|(_, strength)| *strength > 0.0)
            .collect()
    }

    fn counts(&self) -> Vec<u64> {
        let count = |feature| self.active(feature).len() as u64;
        (0..self.d_sae).map(count).collect()
    }
}

fn write_codes(path: &Path, rows: &[BTreeMap<u32, f32>]) {
    let mut codes: Vec<Vec<(u32, f32)>> = Vec::new();
    for row in rows {
        let mut row: Vec<(u32, f32)> = row
            .iter()
            .map(|(&feature, &value)| (feature, value))
            .collect();
        row.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        codes.push(row);
    }
    let mut offsets = vec![0_i64];
    offsets.extend(codes.iter().scan(0, |end, row| {
        *end += row.len() as i64;
        Some(*end)
    }));
    let (indices, values): (Vec<u32>, Vec<f32>) = codes.concat().into_iter().unzip();
    let n = rows.len();
    let (tokens, sequence) = (vec![0_i32; n], vec![0_i64; n]);
    let (position, segment) = (vec![0_i32; n], vec![0_u8; n]);
    let tensor = |name: &str, dtype, length, bytes| Tensor {
        name: name.to_owned(),
        dtype,
        shape: vec![length],
        bytes,
    };
    let tensors = vec![
        tensor(
            "values",
            Dtype::F32,
            values.len(),
            bytemuck::cast_slice(&values),
        ),
        tensor(
            "indices",
            Dtype::U32,
            indices.len(),
            bytemuck::cast_slice(&indices),
        ),
        tensor(
            "row_offsets",
            Dtype::I64,
            n + 1,
            bytemuck::cast_slice(&offsets),
        ),
        tensor("tokens", Dtype::I32, n, bytemuck::cast_slice(&tokens)),
        tensor(
            "sequence_id",
            Dtype::I64,
            n,
            bytemuck::cast_slice(&sequence),
        ),
        tensor("position", Dtype::I32, n, bytemuck::cast_slice(&position)),
        tensor("segment", Dtype::U8, n, &segment),
    ];
    write_shard(path, tensors, &Cancel::new()).unwrap();
}

fn gathered(world: &World, spill: &Spill, work: Work) -> Vec<Columns> {
    let places = Places::new(&world.places).unwrap();
    let texts = Texts {
        places,
        stretches: &Stretches::of(&places),
        bases: &Bases::of(&places),
    };
    let bucket = |bucket| gather(spill, bucket, texts, work, &Cancel::new()).unwrap();
    (0..spill.buckets()).map(bucket).collect()
}

/// One column of all buckets.
fn column<T: Clone>(all: &[Columns], of: impl Fn(&Columns) -> &Vec<T>) -> Vec<T> {
    all.iter().flat_map(|columns| of(columns).clone()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn buckets_hold_what_loops_find(
        world in world(),
        (size, records, threads) in (1_usize..30, 1_u64..40, 1_usize..4),
        (examples, per_sequence) in (1_usize..7, 0_usize..3),
        (quantiles, per_quantile) in (0_usize..6, 0_usize..4),
        (negatives, window, tokens) in (0_usize..5, 0_usize..4, 0_usize..3),
        seed: u64,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let files = world.write(folder.path(), size);
        let mut counts = vec![0; world.d_sae];
        count_shards(&files, &mut counts, threads, &Cancel::new()).unwrap();
        prop_assert_eq!(&counts, &world.counts());
        let file = folder.path().join("spill");
        // One shard after another, with the file closed between them.
        let mut filled = None;
        for file_of_codes in &files {
            let spill = Spill::open(&file, &counts, records, filled).unwrap();
            let shard = std::slice::from_ref(file_of_codes);
            scatter_shards(&spill, shard, None, threads, &Cancel::new()).unwrap();
            filled = Some(spill.filled());
        }
        let spill = Spill::open(&file, &counts, records, filled).unwrap();
        let options = Options {
            examples, per_sequence, quantiles, per_quantile, negatives, window, tokens, seed,
        };
        let all = gathered(&world, &spill, Work { options, activations: true, threads });
        let bare = gathered(&world, &spill, Work { options, activations: false, threads: 1 });
        prop_assert!(bare.iter().all(|columns| columns.activations.feature.is_empty()));
        prop_assert_eq!(
            column(&all, |c| &c.examples.position), column(&bare, |c| &c.examples.position)
        );
        check(&world, &all, options);
    }

    #[test]
    fn pairs_are_those_that_loops_count(
        world in world(),
        (size, block, bytes) in (1_usize..30, 1_usize..40, 0_usize..60),
        (n, least, threads) in (0_usize..4, 0_u32..3, 1_usize..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let files = world.write(folder.path(), size);
        let counts = world.counts();
        let rows_of = |feature| -> BTreeSet<usize> {
            world.active(feature).into_iter().map(|(row, _)| row).collect()
        };
        let sets: Vec<BTreeSet<usize>> = (0..world.d_sae).map(rows_of).collect();
        let mut partners = Partners::new(world.d_sae, n);
        for range in tiles(world.d_sae, bytes) {
            let pairs = Coactivation::new(world.d_sae, range.clone()).unwrap();
            pairs.add_shards(&files, block, threads, &Cancel::new()).unwrap();
            let mut row = Vec::new();
            for a in range {
                pairs.row(a, &mut row);
                let met = |b: usize| sets[a].intersection(&sets[b]).count() as u32;
                prop_assert_eq!(&row, &(0..a).map(met).collect::<Vec<_>>());
            }
            partners.add(&pairs, &counts, least, threads, &Cancel::new()).unwrap();
        }
        for (a, found) in partners.best().iter().enumerate() {
            let mut expected: Vec<(u32, u32, u64)> = (0..world.d_sae)
                .filter(|&b| b != a)
                .map(|b| (b as u32, sets[a].intersection(&sets[b]).count() as u32, counts[b]))
                .filter(|&(_, together, _)| together >= least.max(1))
                .collect();
            expected.sort_by(|x, y| {
                let (mine, theirs) = (u64::from(x.1) * y.2, u64::from(y.1) * x.2);
                theirs.cmp(&mine).then(y.1.cmp(&x.1)).then(x.0.cmp(&y.0))
            });
            expected.truncate(n);
            let found: Vec<_> = found.iter().map(|p| (p.feature, p.together, p.count)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

fn check(world: &World, all: &[Columns], options: Options) {
    let places = &world.places;
    let spot = |row: usize| (places[row].sequence(), places[row].position);
    let chosen = |of: fn(&Columns) -> &super::columns::Chosen| {
        let feature = column(all, |c| &of(c).feature);
        let rank = column(all, |c| &of(c).rank);
        let sequence = column(all, |c| &of(c).sequence);
        let position = column(all, |c| &of(c).position);
        let rows: Vec<(i32, i32, (i64, i32))> = (0..feature.len())
            .map(|at| (feature[at], rank[at], (sequence[at], position[at])))
            .collect();
        (rows, column(all, |c| &of(c).strength))
    };
    let (mut activations, mut examples, mut intervals) = (Vec::new(), Vec::new(), Vec::new());
    let (mut strengths, mut of_intervals) = (Vec::new(), Vec::new());
    let (mut sums, mut largest) = (Vec::new(), Vec::new());
    let (mut histogram, mut segments, mut positions) = (Vec::new(), Vec::new(), Vec::new());
    for feature in 0..world.d_sae {
        let name = feature as i32;
        let mut active = world.active(feature);
        activations.extend(
            active
                .iter()
                .map(|&(row, strength)| (name, spot(row), strength)),
        );
        let total = active
            .iter()
            .fold(0, |total, &(_, strength)| sum::add(total, strength));
        sums.push((total >> 64) as f64 + (total as u64) as f64 * (-64f64).exp2());
        let (mut bins, mut parts, mut spots) = ([0; BINS], [0; SEGMENTS], [0; POSITION_BINS]);
        for &(row, strength) in &active {
            bins[bin_of(strength)] += 1;
            parts[places[row].segment()] += 1;
            spots[position_bin(places[row].position)] += 1;
        }
        histogram.extend(bins);
        segments.extend(parts);
        positions.extend(spots);
        active.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        largest.push(active.first().map_or(0.0, |first| first.1));
        let mut of_sequence = BTreeMap::new();
        let mut rank = 0;
        for &(row, strength) in &active {
            let present = of_sequence.entry(spot(row).0).or_insert(0);
            if rank < options.examples
                && (options.per_sequence == 0 || *present < options.per_sequence)
            {
                *present += 1;
                rank += 1;
                examples.push((name, rank as i32, spot(row)));
                strengths.push(strength);
            }
        }
        active.reverse(); // the weakest first
        let seed = mix(options.seed.wrapping_add(GOLDEN)) ^ mix(feature as u64);
        for quantile in 0..options.quantiles {
            let cut = |at: usize| active.len() * at / options.quantiles;
            let inside = &active[cut(quantile)..cut(quantile + 1)];
            let mut drawn = inside.to_vec();
            drawn.sort_by_key(|&(row, _)| Ranking { seed }.rank(row as i64));
            for (at, &(row, strength)) in drawn.iter().take(options.per_quantile).enumerate() {
                intervals.push((name, at as i32 + 1, spot(row)));
                let (low, high) = (inside[0].1, inside[inside.len() - 1].1);
                of_intervals.push((quantile as i32, low, high, inside.len() as i64, strength));
            }
        }
    }
    let feature = column(all, |c| &c.activations.feature);
    let sequence = column(all, |c| &c.activations.sequence);
    let position = column(all, |c| &c.activations.position);
    let strength = column(all, |c| &c.activations.strength);
    let found: Vec<_> = (0..strength.len())
        .map(|at| (feature[at], (sequence[at], position[at]), strength[at]))
        .collect();
    assert_eq!(found, activations);
    assert_eq!(column(all, |c| &c.features.sum), sums);
    assert_eq!(column(all, |c| &c.features.max), largest);
    assert_eq!(column(all, |c| &c.features.histogram), histogram);
    assert_eq!(column(all, |c| &c.features.segments), segments);
    assert_eq!(column(all, |c| &c.features.positions), positions);
    assert_eq!(chosen(|c| &c.examples), (examples, strengths));
    let (rows, strength) = chosen(|c| &c.intervals.chosen);
    assert_eq!(rows, intervals);
    let (quantile, count) = (
        column(all, |c| &c.intervals.quantile),
        column(all, |c| &c.intervals.count),
    );
    let (low, high) = (
        column(all, |c| &c.intervals.low),
        column(all, |c| &c.intervals.high),
    );
    let found: Vec<_> = (0..strength.len())
        .map(|at| (quantile[at], low[at], high[at], count[at], strength[at]))
        .collect();
    assert_eq!(found, of_intervals);
    check_negatives(world, &chosen(|c| &c.negatives).0, options);
    check_lifts(world, all, options);
}

/// Each is a place of its own that is far from all activations.
fn check_negatives(world: &World, found: &[(i32, i32, (i64, i32))], options: Options) {
    for feature in 0..world.d_sae {
        let mine: Vec<_> = found.iter().filter(|one| one.0 == feature as i32).collect();
        let spots: BTreeSet<_> = mine.iter().map(|one| one.2).collect();
        assert!(mine.len() <= options.negatives && spots.len() == mine.len());
        assert!(mine
            .iter()
            .enumerate()
            .all(|(at, one)| one.1 == at as i32 + 1));
        for (row, _) in world.active(feature) {
            let place = &world.places[row];
            let far = |spot: &(i64, i32)| {
                spot.0 != place.sequence()
                    || spot.1.abs_diff(place.position) as usize > options.window
            };
            assert!(spots.iter().all(far));
        }
    }
}

/// Counts of tokens are those of the rows before, of, and after the activations.
fn check_lifts(world: &World, all: &[Columns], options: Options) {
    let places = Places::new(&world.places).unwrap();
    let feature = column(all, |c| &c.lifts.feature);
    let (offset, token) = (
        column(all, |c| &c.lifts.offset),
        column(all, |c| &c.lifts.token),
    );
    let (count, score) = (
        column(all, |c| &c.lifts.count),
        column(all, |c| &c.lifts.score),
    );
    let mut of_offset = BTreeMap::new();
    for at in 0..feature.len() {
        let active = world.active(feature[at] as usize);
        let is = |row: usize| places.token(row, offset[at]) == Some(token[at] as usize);
        assert_eq!(
            count[at],
            active.iter().filter(|(row, _)| is(*row)).count() as i64
        );
        let scores: &mut Vec<f64> = of_offset.entry((feature[at], offset[at])).or_default();
        assert!(scores.last().is_none_or(|last| *last >= score[at]));
        scores.push(score[at]);
    }
    for feature in 0..world.d_sae {
        for offset in -1..=1 {
            let active = world.active(feature);
            let tokens: BTreeSet<_> = active
                .iter()
                .filter_map(|(row, _)| places.token(*row, offset))
                .collect();
            let found = of_offset.get(&(feature as i32, offset)).map_or(0, Vec::len);
            assert_eq!(found, tokens.len().min(options.tokens));
        }
    }
}

fn problem(result: crate::Result<impl Sized>) -> String {
    match result.err() {
        Some(Error::InvalidArgument(text)) => text,
        Some(other) => panic!("{other:?}"),
        None => panic!("no error"),
    }
}

#[test]
fn a_feature_that_no_memory_holds_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let counts = [1, 1 << 60, 1];
    let file = folder.path().join("spill");
    std::fs::write(&file, []).unwrap(); // as if it had been filled
    let spill = Spill::open(&file, &counts, 4, Some(counts.to_vec())).unwrap();
    let text = problem(spill.read(1, &Cancel::new()));
    assert!(text.contains("of feature 1 need more memory"), "{text}");
}

/// The looks of `work` whether to stop, and that it stops at each of them.
fn looks<T>(mut work: impl FnMut(&Cancel) -> crate::Result<T>) -> usize {
    for last in 0.. {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let cancel = Cancel::listening(Duration::ZERO, move || {
            count.fetch_add(1, Ordering::Relaxed) == last
        });
        match work(&cancel) {
            Ok(_) => return asked.load(Ordering::Relaxed),
            Err(error) => assert!(matches!(error, Error::Interrupted), "{error:?}"),
        }
        assert_eq!(asked.load(Ordering::Relaxed), last + 1);
    }
    unreachable!()
}

#[test]
fn a_feature_of_many_activations_can_be_cancelled_in_its_midst() {
    const STRETCHES: usize = 3;
    let size = STRETCHES * STRETCH;
    let folder = tempfile::tempdir().unwrap();
    let spill = Spill::open(&folder.path().join("spill"), &[size as u64], 1, None).unwrap();
    let mut writer = spill.writer(1 << 20);
    for row in 0..size as u32 {
        let bits = 1_f32.to_bits();
        let feature = 0;
        writer.push(Record { feature, row, bits }).unwrap();
    }
    writer.flush().unwrap();
    assert_eq!(looks(|cancel| spill.read(0, cancel)), STRETCHES);
    let place = |row| Place::new(0, row, 0, 0, row > 0, row + 1 < size as i32);
    let rows: Vec<Place> = (0..size as i32).map(place).collect();
    let places = Places::new(&rows).unwrap();
    let texts = Texts {
        places,
        stretches: &Stretches::of(&places),
        bases: &Bases::of(&places),
    };
    let options = Options {
        examples: 1,
        per_sequence: 1,
        quantiles: 1,
        per_quantile: 1,
        negatives: 1,
        window: 1,
        tokens: 1,
        seed: 0,
    };
    let work = Work {
        options,
        activations: true,
        threads: 1,
    };
    // Read, counted and brought together on this thread; pages are made on others.
    let gathering = looks(|cancel| gather(&spill, 0, texts, work, cancel));
    assert_eq!(gathering, 3 * STRETCHES);
    let key = |row: usize| (row as u64) << 32 | u64::from(1_f32.to_bits());
    let page = looks(|cancel| {
        let mut keys: Vec<u64> = (0..size).map(key).collect();
        Pages::new(texts, options).make(0, &mut keys, cancel, |_, _, _| ())
    });
    // All of them once, then at three offsets.
    assert!(page >= 4 * STRETCHES, "{page}");
    let set = Cancel::new();
    set.cancel();
    let stopped = gather(&spill, 0, texts, work, &set);
    assert!(matches!(stopped, Err(Error::Interrupted)));
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("spill");
    let record = |feature, row, strength: f32| Record {
        feature,
        row,
        bits: strength.to_bits(),
    };
    let spill = Spill::open(&file, &[2, 1], 2, None).unwrap();
    assert_eq!((spill.buckets(), spill.features(1)), (2, 1..2));
    for strength in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let text = problem(spill.writer(64).push(record(0, 5, strength)));
        assert!(text.contains("feature 0 in row 5"), "{text}");
    }
    assert!(problem(spill.writer(64).push(record(2, 5, 1.0))).contains("below d_sae = 2"));
    let mut writer = spill.writer(64);
    for row in [1, 1] {
        writer.push(record(0, row, 1.0)).unwrap();
    }
    writer.flush().unwrap();
    let mut writer = spill.writer(64);
    writer.push(record(0, 2, 1.0)).unwrap();
    assert!(problem(writer.flush()).contains("and more came"));
    // The other bucket is empty; this one names a row twice.
    let rows = [
        Place::new(0, 0, 0, 0, false, false),
        Place::new(0, 1, 0, 0, true, false),
    ];
    let places = Places::new(&rows).unwrap();
    let (stretches, bases) = (Stretches::of(&places), Bases::of(&places));
    let texts = Texts {
        places,
        stretches: &stretches,
        bases: &bases,
    };
    let options = Options {
        examples: 1,
        per_sequence: 1,
        quantiles: 1,
        per_quantile: 1,
        negatives: 1,
        window: 1,
        tokens: 1,
        seed: 0,
    };
    let work = Work {
        options,
        activations: true,
        threads: 2,
    };
    assert!(problem(gather(&spill, 1, texts, work, &Cancel::new())).contains("holds 0 activations"));
    assert!(problem(gather(&spill, 0, texts, work, &Cancel::new())).contains("at row 1"));
    assert!(problem(gather(&spill, 2, texts, work, &Cancel::new())).contains("no bucket 2"));
    assert!(problem(Spill::open(&file, &[2, 1], 2, Some(vec![0; 3]))).contains("other buckets"));
}
