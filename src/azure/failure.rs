//! What the errors of the SDK and of the service mean here.

use std::error::Error as _;

use azure_core::Error as SdkError;
use azure_core::error::ErrorKind as SdkKind;
use azure_core::http::StatusCode;

use crate::error::{Error, ErrorKind};

/// What the service answers instead of success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Somebody has a lease, or one is being broken.
    Leased,
    /// The lease isn't that one, or there is none any more.
    NotOurs,
    NoBlob,
    NoContainer,
    /// It has been changed meanwhile.
    Changed,
    /// It is there already.
    IsThere,
    Other,
}

/// The service's own code for an error.
fn code(error: &SdkError) -> Option<&str> {
    match error.kind() {
        SdkKind::HttpResponse { error_code, .. } => error_code.as_deref(),
        _ => None,
    }
}

pub(super) fn refusal(error: &SdkError) -> Refusal {
    match (code(error), error.http_status()) {
        (
            Some(
                "LeaseAlreadyPresent"
                | "LeaseIsBreakingAndCannotBeAcquired"
                | "LeaseIsBreakingAndCannotBeChanged",
            ),
            _,
        ) => Refusal::Leased,
        (
            Some(
                "LeaseIdMismatchWithLeaseOperation"
                | "LeaseIdMismatchWithBlobOperation"
                | "LeaseNotPresentWithLeaseOperation"
                | "LeaseNotPresentWithBlobOperation"
                | "LeaseLost"
                | "LeaseIsBrokenAndCannotBeRenewed"
                | "LeaseIsAlreadyBroken"
                | "LeaseAlreadyBroken",
            ),
            _,
        ) => Refusal::NotOurs,
        (Some("ContainerNotFound"), _) => Refusal::NoContainer,
        (Some("ConditionNotMet"), _) => Refusal::Changed,
        (Some("BlobAlreadyExists" | "ContainerAlreadyExists" | "LeaseIdMissing"), _) => Refusal::IsThere,
        // Mostly `BlobNotFound`; the answer to a request for properties may have no code.
        (_, Some(StatusCode::NotFound)) => Refusal::NoBlob,
        _ => Refusal::Other,
    }
}

/// An error of a request that may have been carried out.
pub(super) fn of_request(error: &SdkError) -> Error {
    let (kind, message) = meaning(error);
    Error::new(kind, message).with_source(text(error))
}

fn meaning(error: &SdkError) -> (ErrorKind, &'static str) {
    match code(error) {
        Some(
            "AuthenticationFailed"
            | "InvalidAuthenticationInfo"
            | "NoAuthenticationInformation"
            | "AuthorizationFailure"
            | "AuthorizationPermissionMismatch"
            | "AuthorizationProtocolMismatch"
            | "AuthorizationResourceTypeMismatch"
            | "AuthorizationServiceMismatch"
            | "AuthorizationSourceIPMismatch"
            | "InsufficientAccountPermissions"
            | "UnauthorizedBlobOverwrite"
            | "PublicAccessNotPermitted",
        ) => return (ErrorKind::Denied, DENIED),
        Some("AccountIsDisabled" | "ContainerDisabled") => {
            return (ErrorKind::Denied, "this storage account, or container, is disabled");
        }
        Some("ContainerBeingDeleted") => {
            return (
                ErrorKind::Unavailable,
                "the container is being deleted, and can't be made again for a while",
            );
        }
        Some("BlobImmutableDueToPolicy" | "BlobImmutableDueToLegalHold") => {
            return (ErrorKind::Denied, "a policy of the container keeps blobs from being changed");
        }
        _ => {}
    }
    match (error.kind(), error.http_status()) {
        (_, Some(StatusCode::Unauthorized | StatusCode::Forbidden)) => (ErrorKind::Denied, DENIED),
        // Said by the service itself, and not by something before it, nothing was done.
        (_, Some(StatusCode::TooManyRequests | StatusCode::ServiceUnavailable)) if code(error).is_some() => {
            (ErrorKind::Unavailable, "Azure Storage is busy, and has not done what it was asked for")
        }
        (_, Some(status)) if u16::from(status) < 500 && code(error).is_some() => {
            (ErrorKind::Unavailable, "Azure Storage could not do what it was asked for")
        }
        (SdkKind::Connection, None) => (ErrorKind::Unavailable, "Azure Storage can't be reached"),
        (SdkKind::Credential, None) => (ErrorKind::Denied, "no token for Azure Storage"),
        _ => (ErrorKind::Unknown, "the request to Azure Storage failed, and may have been carried out"),
    }
}

const DENIED: &str = "Azure Storage doesn't accept the key or the signature, or doesn't let it do that: the module \
    `fencelock::azure` lists the rights that locks need";

/// The SDK's error in words. What a transport says contains the URL, and with it a signature: of that only what the
/// operating system said is told.
fn text(error: &SdkError) -> String {
    if let Some(status) = error.http_status() {
        return format!("{} {}", u16::from(status), code(error).unwrap_or("without a code"));
    }
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>().filter(|io| io.raw_os_error().is_some()) {
            return io.kind().to_string();
        }
        source = cause.source();
    }
    error.kind().to_string()
}

/// A request that has taken too long.
pub(super) fn timed_out() -> Error {
    Error::new(
        ErrorKind::Unknown,
        "Azure Storage hasn't answered in time, and may do what it was asked for yet",
    )
}
