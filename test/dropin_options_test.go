// SPDX-License-Identifier: Apache-2.0

package test

import (
	"strings"
	"testing"

	"criuhook/criuhook/dropin"
)

const (
	dumps    = "dump -t PID -R -D images -v4 -o log "
	restores = "restore -d -D images -v4 -o log "
)

// both are options that a dump and a restore may have, with good values and bad
// ones. "|" is between those that are tried one by one.
var both = []string{
	"--tree PID|--tree 0|--tree x|--tree -1|--tree 9x",
	"--leave-stopped|-s|-s -R",
	"--leave-running|-R -s -R",
	"--daemon|--no-daemon --no-restore-detached --no-restore-sibling --restore-detached|-d|-dd",
	"--restore-sibling|--restore-sibling --no-restore-detached|-S",
	"--images-dir work|--images-dir /tmp/trial/images|--images-dir missing|--images-dir script|--images-dir \"\"",
	"--work-dir work|-W /tmp/trial/work|--work-dir ./work/../work|-W missing|-W script|-W \"\"",
	"--log-file other.log|-o /tmp/trial/abs.log|-o ../up.log|-o -|-o missing/log|-o /|-o \"\"",
	"--join-ns net:/proc/self/ns/net|-J net:OTHER|-J uts:/proc/OTHER/ns/uts|-J bad:OTHER|-J net:/missing|-J net|-J \"\"",
	"--root /|-r /tmp|-r /missing",
	"--ext-unix-sk|-x|-x1,2|--ext-unix-sk=12|-xbad|--ext-unix-sk=0|-x, ",
	"--tcp-established|--no-tcp-established",
	"--close 3|--close 77|--close -1|--close x",
	"--log-pid|--no-log-pid",
	"--evasive-devices|--no-evasive-devices",
	"--pidfile a.pid|--pidfile /tmp/trial/b.pid|-W work --pidfile c.pid|--pidfile missing/d.pid",
	"--veth-pair a=b|--veth-pair a",
	"--action-script /tmp/trial/script|--action-script /tmp/trial/script --action-script /tmp/trial/script2|--action-script /missing",
	"--link-remap|--no-link-remap",
	"--shell-job|-j|--no-shell-job",
	"--file-locks|-l|--no-file-locks",
	"--no-page-server|--address 127.0.0.1 --port 1|--port x|--port 0|--address \"\"",
	"--prev-images-dir ../work|--prev-images-dir missing|--prev-images-dir /tmp/trial/work",
	"--ms",
	"--track-mem|--no-track-mem",
	"--auto-dedup|--no-auto-dedup",
	"--libdir /missing|-L /tmp/trial|-L /usr/lib/criu",
	"--cpu-cap|--cpu-cap=none|--cpu-cap=all|--cpu-cap=cpu,fpu|--cpu-cap=bad|--cpu-cap=ins|--cpu-cap=^all",
	"--force-irmap|--no-force-irmap",
	"--ext-mount-map a:b|-M auto|-M a|-M ext:/x",
	"--manage-cgroups|--manage-cgroups=none|--manage-cgroups=props|--manage-cgroups=soft|--manage-cgroups=full|--manage-cgroups=strict|--manage-cgroups=ignore|--manage-cgroups=bad",
	"--cgroup-root /x|--cgroup-root cpu:/x|--cgroup-root x",
	"--feature list|--feature mem_dirty_track|--feature bad",
	"--skip-mnt /mnt|--enable-fs tmpfs|--enable-fs all|--enable-fs bad",
	"--enable-external-sharing|--enable-external-masters",
	"--freeze-cgroup /sys/fs/cgroup/missing|--freeze-cgroup bad",
	"--ghost-limit 2M|--ghost-limit 1|--ghost-limit x|--ghost-limit 1G|--ghost-limit -1",
	"--irmap-scan-path /tmp|--irmap-scan-path x",
	"--lsm-profile apparmor:x|--lsm-profile selinux:y|--lsm-profile x|--lsm-profile bad:x",
	"--timeout 5|--timeout 0|--timeout x",
	"--external unix[5]|--external mnt[/x]:y|--external mnt[]|--external dev[8/0]:d|--external file[1:2]|--external bad|--external veth[a]:b|--external tty[1:2]|--external macvlan[a]:b|--external net[1]:x",
	"--empty-ns net|--empty-ns bad",
	"--extra|--no-extra|--experimental|--no-experimental|--all",
	"--cgroup-props x|--cgroup-props-file missing|--cgroup-props-file script|--cgroup-dump-controller cpu",
	"--skip-in-flight|--no-skip-in-flight",
	"--deprecated|--no-deprecated",
	"--display-stats|--no-display-stats",
	"--weak-sysctls|--no-weak-sysctls",
	"--status-fd 3|--status-fd 77|--status-fd x",
	"--tcp-close|--no-tcp-close",
	"--verbosity|--verbosity=1|-v0|-vv|-vvvv|-v4|-vx|--verbosity=vv|-v -v|-v1 -v",
	"--ps-socket 3|--ps-socket x|--ps-socket 0|--ps-socket 77",
	"--no-stream",
	"--config missing|--config script|--config",
	"--no-default-config",
	"--tls|--no-tls|--tls-cacert x|--tls-cacrl x|--tls-cert x|--tls-key x|--tls-no-cn-verify",
	"--cgroup-yard /missing|--cgroup-yard /sys/fs/cgroup",
	"--pre-dump-mode splice|--pre-dump-mode read|--pre-dump-mode bad",
	"--file-validation filesize|--file-validation buildid|--file-validation bad",
	"--skip-file-rwx-check|--no-skip-file-rwx-check",
	"--lsm-mount-context x",
	"--network-lock skip|--network-lock iptables|--network-lock nftables|--network-lock bad",
	"--mntns-compat-mode|--no-mntns-compat-mode",
	"--unprivileged|--no-unprivileged",
	"--ghost-fiemap|--no-ghost-fiemap",
	"--allow-uprobes|--no-allow-uprobes",
	"--mmap-page-image",
	"--exec-cmd",
	"--inherit-fd fd[3]:socket:[1]|--inherit-fd fd[3]:|--inherit-fd fd[77]:pipe:[1]|--inherit-fd x|--inherit-fd debug[3]:hello",
	"--page-server|--page-server --address 127.0.0.1 --port 9|--page-server --ps-socket 77",
	"--lazy-pages --port 1 --address 300.1.1.1",
	"--stream",
	"--help|-h|--version|-V|--no-default-config --help",
}

// TestDropinOptions tries every option of CRIU on a dump and on a restore.
func TestDropinOptions(t *testing.T) {
	b := newBench(t)
	for _, row := range both {
		name, _, _ := strings.Cut(row, "|")
		t.Run(name, func(t *testing.T) {
			for line := range strings.SplitSeq(row, "|") {
				for _, prefix := range []string{dumps, restores} {
					tr := trial{line: prefix + line}
					if why := known[line]; why != "" && prefix == dumps {
						tr.differs = map[string]string{"Stderr": why}
					}
					b.alike(t, tr)
				}
			}
		})
	}
	noCRIULeft(t)
	nothingLeft(t)
}

// known are the differences on a dump that cannot be bridged: what CRIU says on
// stderr when its log is not open yet has one line more, or another, by RPC.
var known = map[string]string{
	"-o missing/log":            "the line \"Can't initiate log\" is added",
	"-o /":                      "the same",
	"--prev-images-dir missing": "\"Can't open images directory\" instead of \"Couldn't open image dir\"",
}

// TestDropinOptionsAll: no option of CRIU's is left out above.
func TestDropinOptionsAll(t *testing.T) {
	tried := map[string]bool{}
	for _, row := range both {
		for _, word := range strings.Fields(strings.ReplaceAll(row, "|", " ")) {
			name, _, _ := strings.Cut(word, "=")
			tried[name] = true
		}
	}
	for _, name := range dropin.OptionNames() {
		if !tried["--"+name] {
			t.Errorf("no row tries --%s", name)
		}
	}
}
