//! Claims about evidence: whether a TEE made it, which one, and what runs in there.

use super::{Explanation, about};

pub(super) const TABLE: &[Explanation] = &[
    about(
        &["evidence.size"],
        "The evidence is no larger than any that a real machine makes.",
        "Something other than evidence was sent, or somebody tries to wear the verifier out.",
        "Look at what was sent. Real evidence has about 5 KB of quote and 30 KB of collateral.",
    ),
    about(
        &["evidence.document"],
        "The evidence is a JSON document with the fields tee, quote and collateral.",
        "The file is not evidence, or was cut or edited on its way.",
        "Fetch the evidence again. `casemate verify --service` fetches and judges it in one step.",
    ),
    about(
        &["quote.structure"],
        "The quote has the layout that Intel specifies, in a version that is known here.",
        "It was cut or edited on its way, is labelled as the wrong kind of TEE, or comes from newer hardware than this \
         version of Casemate knows.",
        "Fetch it again. If it stays so, compare versions of Casemate on both sides; do not trust the machine meanwhile.",
    ),
    about(
        &["collateral.present"],
        "Intel's statements about the platform come with the quote: TCB info, identity of the quoting enclave, and both \
         revocation lists.",
        "The machine could not fetch them, or somebody leaves out the list in which the platform is revoked.",
        "Have the operator set up the collateral service (PCCS) of that machine.",
    ),
    about(
        &["collateral.structure"],
        "Intel's statements about the platform can be read.",
        "They were cut or edited on their way, or are of a version that is not known here.",
        "Have the operator fetch them again from Intel's provisioning service.",
    ),
    about(
        &["root_of_trust"],
        "The chain of signatures ends at Intel's root, or at the development root that your policy names.",
        "The evidence was made by something that is not a TEE: for example the fake TEE for development, while your \
         policy names no development root, or a root of somebody's own.",
        "Do not send anything there. Only on a development machine of your own: put the root that `casemate-fake-tee` \
         prints into the policy as dangerous_development_root. Never do so in a policy that protects anything.",
    ),
    about(
        &["collateral.validity"],
        "All of Intel's statements and revocation lists are valid at the time of the check.",
        "The machine shows statements that expired, because it does not renew them, or because somebody keeps newer \
         revocation lists away from you. Or this machine's clock is wrong.",
        "Compare this machine's clock first. Then have the operator fetch the collateral again; it is good for 30 days.",
    ),
    about(
        &["platform.certificate"],
        "The quote carries the certificate of the platform that made it.",
        "The machine names its platform in encrypted form only, as machines do that were not registered.",
        "Have the operator register the platform with Intel, or set up its PCK certificate.",
    ),
    about(
        &["certificates"],
        "The certificates of platform and statements belong together and none of them is revoked.",
        "The platform's key, the CA that certified it, or the signer of the statements was revoked, as happens after a key \
         was extracted; or pieces of two machines were put together.",
        "Do not trust this machine. If it should be genuine, have the operator fetch the collateral again and ask Intel \
         why it is revoked.",
    ),
    about(
        &["collateral.signatures"],
        "Intel signed the statements about the platform as they are.",
        "They were edited after signing, to make an old platform look current, or were put together from two sources.",
        "Have the operator fetch the collateral again. If it stays so, somebody alters it: do not trust this machine.",
    ),
    about(
        &["quoting_enclave"],
        "Intel's own quoting enclave vouches for the key that signed the quote.",
        "The quote was signed by a key that somebody made; it is a forgery.",
        "Do not trust this machine.",
    ),
    about(
        &["quote.signature"],
        "The quote is as the TEE signed it.",
        "Something in it was changed after signing, for example the measurement.",
        "Do not trust this machine, nor whoever passed the quote on.",
    ),
    about(
        &["tcb.level"],
        "Intel lists the versions of firmware and microcode that the platform reports.",
        "The firmware is older than anything Intel vouches for, or was revoked; or the collateral is of another platform.",
        "Have the operator update BIOS and microcode, and fetch the collateral again.",
    ),
    about(
        &["verification"],
        "The library that verifies quotes and the checks around it agree.",
        "The library refused something that no check of Casemate explains.",
        "Do not trust the evidence, and report this to Casemate's authors, with the transcript.",
    ),
    about(
        &["report_data"],
        "The TEE signed exactly this verifier's fresh nonce and exactly the keys that were shown with it.",
        "Somebody in the middle shows evidence that was recorded earlier, or genuine evidence with keys of his own in place \
         of the enclave's. A cache that answers in the enclave's name looks the same.",
        "Send nothing. Ask again by another network path; look for caches and proxies between here and the enclave.",
    ),
    about(
        &["nonce"],
        "The evidence answers the challenge of this very session.",
        "Evidence of an earlier session was sent again: somebody recorded it, or a client mixed up two attempts.",
        "A genuine enclave simply begins again. If you see this often, somebody replays evidence to your broker.",
    ),
    about(
        &["tee"],
        "The TEE is of a kind that the policy lists.",
        "The service moved to other hardware than the policy was written for.",
        "If you accept that kind of TEE, add it to `tee` in the policy.",
    ),
    about(
        &["debug"],
        "Nobody can debug or profile the TEE, which would let the host read all of its memory.",
        "It was started in debug mode: by an operator who wants to look inside, or by a developer who forgot it.",
        "Do not use it; there is no setting that allows it. Have the operator start it without debugging.",
    ),
    about(
        &["td_attributes.reserved", "xfam"],
        "The TD was started with no attributes or processor features but those that this verifier knows.",
        "The platform or its hypervisor is newer than this version of Casemate, or sets what it should not.",
        "Update Casemate; otherwise have the operator start the TD with known attributes.",
    ),
    about(
        &["td_attributes.sept_ve_disable"],
        "The host cannot inject page faults into the TD.",
        "The hypervisor started the TD without SEPT_VE_DISABLE, as old versions of QEMU do.",
        "Have the operator update the hypervisor, or set the attribute.",
    ),
    about(
        &["td_attributes.migratable"],
        "The TD cannot be moved to another machine while it runs.",
        "The operator started it as migratable; whoever moves it decides where its memory goes.",
        "Have the operator start it as not migratable.",
    ),
    about(
        &["service_td"],
        "No other TD has a hold on this one, save those that the policy names.",
        "The operator bound a service TD, for example for migration or a vTPM.",
        "If you trust that service TD, put its measurement into the policy under tdx.service_td.",
    ),
    about(
        &["tcb.status"],
        "Intel calls the platform's firmware and microcode up to date.",
        "A vulnerability became known that the machine is not patched against; the found value names the advisories.",
        "Have the operator update. To accept the state for a while, read the advisories and add a [[tcb.allow]] with an \
         end to the policy.",
    ),
    about(
        &["tcb.evaluation_data_number"],
        "The verdict about the platform rests on an evaluation of Intel that is new enough for the policy.",
        "The machine shows an old evaluation, in which newer vulnerabilities do not count.",
        "Have the operator fetch the collateral anew, with update=early.",
    ),
    about(
        &["measurement"],
        "What runs in the TEE is one of the things that the policy names.",
        "The policy has no [[measurement]] for this kind of TEE.",
        "Add the [[measurement]] that your provider publishes or that `casemate measure` computes.",
    ),
    about(
        &["measurement.mr_td", "measurement.mr_enclave"],
        "The program in the TEE is, byte for byte, the one that the policy names.",
        "Another build was started: usually an update of which the policy does not know yet, otherwise a program of \
         somebody else's.",
        "Ask the provider whether it published a new measurement. If you build it yourself, run `casemate measure` again \
         and raise the policy's version. Never copy the value from the refusal.",
    ),
    about(
        &["measurement.mr_config_id", "measurement.config_id"],
        "The enclave runs with the configuration that the policy names.",
        "The configuration file was edited after it was measured, even in a comment; or the host started the enclave with \
         another one.",
        "Compare the file with the measured one. If the edit is meant, run `casemate measure` again and update the policy.",
    ),
    about(
        &["measurement.rtmr1"],
        "The kernel is the measured one; with the fake TEE, the program's arguments are.",
        "The enclave was started with other arguments, or the image has another kernel.",
        "Start it exactly as it was measured; `casemate measure --arg` takes the arguments that you mean.",
    ),
    about(
        &["measurement.rtmr2"],
        "Kernel command line and initial file system are the measured ones; with the fake TEE, the environment is.",
        "The enclave was started with variables in its environment, such as LD_PRELOAD, or the image has another command line.",
        "Start it with an empty environment (`env -i`), or measure with the variables that you mean.",
    ),
    about(
        &["measurement.rtmr0", "measurement.rtmr3"],
        "Virtual hardware and what the guest measured itself are as the policy says.",
        "The virtual machine has another number of processors, another firmware volume or other measured software.",
        "Compare the machine's definition with the one that was measured.",
    ),
    about(
        &[
            "measurement.mr_seam",
            "measurement.mr_owner",
            "measurement.mr_owner_config",
            "measurement.td_attributes",
            "measurement.xfam",
            "measurement.mr_signer",
            "measurement.isv_prod_id",
            "measurement.isv_svn",
            "measurement.attributes",
        ],
        "This field of the report has the value that the policy names.",
        "The TEE was started by another owner, or with another module, product or attributes than the policy was \
         written for.",
        "Find out from the operator what changed; update the policy only if you know why.",
    ),
];
