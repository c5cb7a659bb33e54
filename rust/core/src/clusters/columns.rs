//! What is found of a bucket's features, as columns of the tables.

use super::page::Page;
use super::place::Place;

/// Columns of the tables; `place` columns are the tables' sequence_id and token_idx.
#[derive(Debug, Default)]
pub struct Columns {
    pub activations: Activations,
    /// Of the bucket's features, each in turn.
    pub features: Features,
    pub examples: Chosen,
    pub intervals: Intervals,
    pub negatives: Chosen,
    pub lifts: Lifts,
}

/// By feature, then by place.
#[derive(Debug, Default)]
pub struct Activations {
    pub feature: Vec<i32>,
    pub sequence: Vec<i64>,
    pub position: Vec<i32>,
    pub strength: Vec<f32>,
}

/// One of each a feature.
#[derive(Debug, Default)]
pub struct Features {
    pub sum: Vec<f64>,
    pub max: Vec<f32>,
    /// `[features, BINS]`
    pub histogram: Vec<i64>,
    /// `[features, SEGMENTS]`
    pub segments: Vec<i64>,
    /// `[features, POSITION_BINS]`
    pub positions: Vec<i64>,
}

/// Chosen places of features; negatives have no strength.
#[derive(Debug, Default)]
pub struct Chosen {
    pub feature: Vec<i32>,
    pub rank: Vec<i32>,
    pub sequence: Vec<i64>,
    pub position: Vec<i32>,
    pub strength: Vec<f32>,
}

/// See the table `intervals`.
#[derive(Debug, Default)]
pub struct Intervals {
    pub chosen: Chosen,
    pub quantile: Vec<i32>,
    pub low: Vec<f32>,
    pub high: Vec<f32>,
    pub count: Vec<i64>,
}

/// See the table `token_lift`.
#[derive(Debug, Default)]
pub struct Lifts {
    pub feature: Vec<i32>,
    pub offset: Vec<i32>,
    pub rank: Vec<i32>,
    pub token: Vec<i32>,
    pub count: Vec<i64>,
    pub share: Vec<f64>,
    pub weighted_share: Vec<f64>,
    pub base: Vec<f64>,
    pub score: Vec<f64>,
}

impl Columns {
    pub(super) fn push(&mut self, feature: u32, page: &Page, rows: &[Place]) {
        let features = &mut self.features;
        // As the mean is made: the whole and the fraction each rounded, then added.
        features
            .sum
            .push((page.sum >> 64) as f64 + (page.sum as u64) as f64 * (-64f64).exp2());
        features.max.push(page.largest);
        let signed = |counts: &[u64]| counts.iter().map(|&n| n as i64).collect::<Vec<_>>();
        features.histogram.extend(signed(&page.histogram));
        features.segments.extend(signed(&page.segments));
        features.positions.extend(signed(&page.positions));
        for (at, &(strength, row)) in page.examples.iter().enumerate() {
            self.examples
                .push(feature, at + 1, Some(strength), row, rows);
        }
        for &row in &page.negatives {
            let rank = 1 + self.negatives.rank_in(feature);
            self.negatives.push(feature, rank, None, row, rows);
        }
        for drawn in &page.intervals {
            let (strength, row) = drawn.activation;
            let intervals = &mut self.intervals;
            intervals
                .chosen
                .push(feature, drawn.rank, Some(strength), row, rows);
            intervals.quantile.push(drawn.quantile as i32);
            intervals.low.push(drawn.low);
            intervals.high.push(drawn.high);
            intervals.count.push(drawn.count as i64);
        }
        let mut rank = 0;
        let mut offset = None;
        for lift in &page.lifts {
            rank = if offset == Some(lift.offset) {
                rank + 1
            } else {
                1
            };
            offset = Some(lift.offset);
            let lifts = &mut self.lifts;
            lifts.feature.push(feature as i32);
            lifts.offset.push(lift.offset);
            lifts.rank.push(rank);
            lifts.token.push(lift.token as i32);
            lifts.count.push(lift.count as i64);
            lifts.share.push(lift.share);
            lifts.weighted_share.push(lift.weighted_share);
            lifts.base.push(lift.base);
            lifts.score.push(lift.score);
        }
    }

    pub(super) fn append(&mut self, mut other: Self) {
        let (mine, theirs) = (&mut self.features, &mut other.features);
        mine.sum.append(&mut theirs.sum);
        mine.max.append(&mut theirs.max);
        mine.histogram.append(&mut theirs.histogram);
        mine.segments.append(&mut theirs.segments);
        mine.positions.append(&mut theirs.positions);
        self.examples.append(&mut other.examples);
        self.negatives.append(&mut other.negatives);
        let (mine, theirs) = (&mut self.intervals, &mut other.intervals);
        mine.chosen.append(&mut theirs.chosen);
        mine.quantile.append(&mut theirs.quantile);
        mine.low.append(&mut theirs.low);
        mine.high.append(&mut theirs.high);
        mine.count.append(&mut theirs.count);
        let (mine, theirs) = (&mut self.lifts, &mut other.lifts);
        mine.feature.append(&mut theirs.feature);
        mine.offset.append(&mut theirs.offset);
        mine.rank.append(&mut theirs.rank);
        mine.token.append(&mut theirs.token);
        mine.count.append(&mut theirs.count);
        mine.share.append(&mut theirs.share);
        mine.weighted_share.append(&mut theirs.weighted_share);
        mine.base.append(&mut theirs.base);
        mine.score.append(&mut theirs.score);
    }
}

/// Zeros; None where there is no memory for them.
pub(super) fn zeroed<T: Copy + Default>(size: usize) -> Option<Vec<T>> {
    let mut made = Vec::new();
    made.try_reserve_exact(size).ok()?;
    made.resize(size, T::default());
    Some(made)
}

impl Activations {
    pub(super) fn zeroed(size: usize) -> Option<Self> {
        Some(Self {
            feature: zeroed(size)?,
            sequence: zeroed(size)?,
            position: zeroed(size)?,
            strength: zeroed(size)?,
        })
    }

    pub(super) fn rest(&mut self) -> Room<'_> {
        Room {
            feature: &mut self.feature,
            sequence: &mut self.sequence,
            position: &mut self.position,
            strength: &mut self.strength,
        }
    }
}

/// Consecutive rows of [`Activations`] that are to be written.
#[derive(Debug, Default)]
pub(super) struct Room<'a> {
    pub feature: &'a mut [i32],
    pub sequence: &'a mut [i64],
    pub position: &'a mut [i32],
    pub strength: &'a mut [f32],
}

impl<'a> Room<'a> {
    /// All that was not taken.
    pub(super) fn rest(&mut self) -> Room<'_> {
        Room {
            feature: &mut *self.feature,
            sequence: &mut *self.sequence,
            position: &mut *self.position,
            strength: &mut *self.strength,
        }
    }

    /// The next so many rows; fewer if there are no more.
    pub(super) fn take(&mut self, size: usize) -> Room<'a> {
        Room {
            feature: front(&mut self.feature, size),
            sequence: front(&mut self.sequence, size),
            position: front(&mut self.position, size),
            strength: front(&mut self.strength, size),
        }
    }
}

fn front<'a, T>(all: &mut &'a mut [T], size: usize) -> &'a mut [T] {
    let whole = std::mem::take(all);
    let (head, rest) = whole.split_at_mut(size.min(whole.len()));
    *all = rest;
    head
}

impl Chosen {
    fn push(&mut self, feature: u32, rank: usize, strength: Option<f32>, row: u32, rows: &[Place]) {
        let place = &rows[row as usize];
        self.feature.push(feature as i32);
        self.rank.push(rank as i32);
        self.sequence.push(place.sequence());
        self.position.push(place.position);
        self.strength.extend(strength);
    }

    /// The last rank of a feature that is being pushed.
    fn rank_in(&self, feature: u32) -> usize {
        match (self.feature.last(), self.rank.last()) {
            (Some(&last), Some(&rank)) if last == feature as i32 => rank as usize,
            _ => 0,
        }
    }

    fn append(&mut self, other: &mut Self) {
        self.feature.append(&mut other.feature);
        self.rank.append(&mut other.rank);
        self.sequence.append(&mut other.sequence);
        self.position.append(&mut other.position);
        self.strength.append(&mut other.strength);
    }
}
