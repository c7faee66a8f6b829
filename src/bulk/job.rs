//! What is asked of a job, and whether it may go on from what its output has.

use std::path::{Path, PathBuf};

use super::earlier::{Earlier, Unreadable};
use super::error::BulkError;
use super::input::Source;
use super::output::{self, Output};
use super::place::{Identity, Place};
use super::settings::{self, Rounding, Settings};
use crate::lines::Defaults;

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Job {
    /// Request lines; see [`lines`](crate::lines). gzip and zstd are told by their first bytes.
    pub input: Place,
    /// Result lines, in the order in which requests end; compressed if it is called `.gz` or `.zst`.
    pub output: Place,
    /// What is done with an output that exists.
    pub existing: Existing,
    /// What lines leave out.
    pub defaults: Defaults,
    /// The model as it was asked for.
    pub model: String,
    /// Where its checkpoint is, unless it is a preset.
    pub checkpoint: Option<PathBuf>,
    /// How the engine rounds.
    pub rounding: Rounding,
    /// A longer line is a bad line.
    pub max_line_bytes: usize,
    /// Hear of every token, so that a report has latencies.
    pub tokens: bool,
}

/// What is done with an output that has something in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Existing {
    /// Refuse the job.
    #[default]
    Refuse,
    /// Write it anew.
    Overwrite,
    /// Keep its good results, if they were made of the same lines by the same model and sampling, and run the other lines.
    Resume,
    /// Likewise, whatever made the results; those of lines that the input does not have are dropped.
    ResumeAnyway,
}

impl Existing {
    pub(super) fn resumes(self) -> bool {
        matches!(self, Existing::Resume | Existing::ResumeAnyway)
    }
}

impl Job {
    /// The settings of this job, for an output whose neighbours it may write.
    pub(super) fn settings(&self, output: &Path, source: &Source) -> Result<Settings, BulkError> {
        for path in output::neighbours(output) {
            if source.identity.is_some() && source.identity == Identity::at(&path) {
                return Err(BulkError::SameFile(path.into()));
            }
        }
        Ok(Settings::of(self))
    }

    /// What is kept of what a regular output has.
    pub(super) fn earlier(
        &self,
        path: &Path,
        settings: &Settings,
        output: &Output,
        source: &Source,
    ) -> Result<Earlier, BulkError> {
        let failed = |cause| BulkError::Output { place: self.output.clone(), cause };
        if output.length().map_err(failed)? == 0 || self.existing == Existing::Overwrite {
            return Ok(Earlier::default());
        }
        if self.existing == Existing::Refuse {
            return Err(BulkError::Exists(path.to_owned()));
        }
        let mut earlier = output.earlier().map_err(|unreadable| match unreadable {
            Unreadable::Io(cause) => failed(cause),
            Unreadable::NotResult(line) => BulkError::NotResults { path: path.to_owned(), line },
        })?;
        let mut differences = Vec::new();
        if earlier.results > 0 {
            match Settings::read(path) {
                Ok(Some(then)) => differences.extend(settings.differences(&then)),
                Ok(None) => differences.push(format!("{} is missing", settings::path(path).display())),
                Err(cause) => {
                    differences.push(format!("{} can't be read: {cause}", settings::path(path).display()))
                }
            }
        }
        let input_failed = |cause| BulkError::Input { place: self.input.clone(), cause };
        if let Some(mut lines) = source.reread(self.max_line_bytes).map_err(input_failed)? {
            let same = earlier.compare(&mut lines).map_err(input_failed)?;
            differences.extend(earlier.strangers(&same));
            earlier.keep(&same);
        }
        match differences.is_empty() || self.existing == Existing::ResumeAnyway {
            true => Ok(earlier),
            false => Err(BulkError::Differs { path: path.to_owned(), differences }),
        }
    }
}
