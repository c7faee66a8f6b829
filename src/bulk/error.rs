//! Why a job can't begin or go on; each error says what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::place::Place;

/// What concerns a whole job. What is wrong with a line is in its result.
#[derive(Debug, Error)]
pub enum BulkError {
    /// The input.
    #[error("the input {place} can't be read: {cause}; check --input")]
    Input {
        /// Where it is.
        place: Place,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// The output, or what is written beside it.
    #[error("the output {place} can't be written: {cause}; {}", output_advice(cause))]
    Output {
        /// Where it is.
        place: Place,
        /// What the system says.
        #[source]
        cause: io::Error,
    },
    /// Writing would destroy the requests, or turn results into requests.
    #[error("the input and the output are the same file, {0}; write the results elsewhere")]
    SameFile(Place),
    /// There are results already.
    #[error("the output {} exists; go on with it (--resume), empty it (--overwrite), or give another --output", .0.display())]
    Exists(PathBuf),
    /// There can be one writer.
    #[error("another process is writing the output {}; wait for it, or give another --output", .0.display())]
    Locked(PathBuf),
    /// What was written can't be read back.
    #[error(
        "--resume reads the output back, and {0} is no regular file; leave --resume out, or write to a file"
    )]
    NoResume(Place),
    /// Something else than results is in the way.
    #[error(
        "line {line} of {} is no result that says which input line it is of, so --resume can't go on from it; give another \
         --output, or --overwrite", path.display()
    )]
    NotResults {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: u64,
    },
    /// The results there are were made of something else.
    #[error(
        "the results in {} are not of this job: {}; give what they were made with, or another --output, or mix them \
         (--resume-anyway)", path.display(), differences.join("; ")
    )]
    Differs {
        /// The output.
        path: PathBuf,
        /// What was, and what is.
        differences: Vec<String>,
    },
    /// While it is read, a line turns out to be another than the one whose result there is.
    #[error(
        "line {line} of the input is not the one that its result in {output} is of; resume with the input of the first \
         run, or give another --output (--resume-anyway takes an input that differs only as a file that does not change)"
    )]
    LineDiffers {
        /// The output.
        output: Place,
        /// From 1.
        line: u64,
    },
    /// The job was told to stop.
    #[error("stopped")]
    Stopped,
    /// The engine.
    #[error("{0}; the results so far are in the output: run again with --resume")]
    Engine(#[from] crate::Error),
}

fn output_advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "it was cut back to whole lines: make room, then go on with --resume"
        }
        io::ErrorKind::BrokenPipe => "its reader is gone",
        _ => "check that its directory exists and is writable",
    }
}
