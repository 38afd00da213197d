# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
#
# Sourced by the scripts beside it: where things are kept, and the Debian 13
# root that has a working CRIU.

# shellcheck disable=SC2034 # for those who source this
top=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cache=${CRIUHOOK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/criuhook}
mirror=${CRIUHOOK_MIRROR:-http://deb.debian.org/debian}
# CRIU of Debian 12 fails on kernels since 6.13; trixie's 4.1.1 does not.
suite=trixie
packages=criu,nscd,sssd-common,sssd-proxy,libnss-sss,gcc,libc6-dev,iproute2,nftables,iptables
packages+=,winbind,libnss-winbind,libnss-ldapd,nslcd,slapd,libnss-systemd,systemd-userdbd,libnss-mdns,avahi-daemon
packages+=,dbus,rsyslog,systemd,libdbus-1-dev,libsystemd-dev,sssd-ad-common
packages+=,openjdk-21-jdk-headless,openjdk-25-jre-headless,runc,crun,podman,libcriu-dev
# unscd conflicts with nscd: both are /usr/sbin/nscd. It is put beside it by hand.
beside=unscd
# Another package list is another root, so that an old one is never mistaken for it.
root=$cache/root-$suite-$(printf '%s' "$packages beside $beside" | sha256sum | cut -c1-12)

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 1; }

# use_go: finds Go, and makes it keep what it downloads and builds in the cache.
use_go() {
	command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
	command -v go >/dev/null ||
		die "Go is missing; it must be in PATH ($(grep '^go ' "$top/go.mod") or newer, https://go.dev/dl)"
	mkdir -p "$cache/bin" "$cache/tmp" || die "cannot make the cache folder $cache; CRIUHOOK_CACHE names another"
	# What the user has set with "go env -w", a module proxy for one, stays.
	GOENV=${GOENV:-${XDG_CONFIG_HOME:-$HOME/.config}/go/env}
	# Go counts its own use below XDG_CONFIG_HOME.
	export GOENV XDG_CONFIG_HOME=$cache/config
	export GOPATH=$cache/go GOMODCACHE=$cache/go/pkg/mod GOCACHE=$cache/go-build STATICCHECK_CACHE=$cache/staticcheck
	# Modules are read-only else, and rm -rf would not remove the cache.
	GOFLAGS="$(go env GOFLAGS) -modcacherw"
	export GOFLAGS
}

# need_package COMMAND PACKAGE: installs a Debian package when COMMAND is missing.
need_package() {
	command -v "$1" >/dev/null && return
	command -v apt-get >/dev/null ||
		die "$1 is missing, and there is no apt-get to install $2 with; install it by hand"
	say "installing the Debian package $2 on this machine (for $1)"
	local log=$cache/apt.log
	if ! DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$2" >"$log" 2>&1; then
		# The package lists are old or absent.
		{ apt-get update && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends "$2"; } >>"$log" 2>&1 ||
			{ tail -n 20 "$log" >&2; die "cannot install $2; the whole output is in $log"; }
	fi
}

# prepare_root: builds the root, once. Says nothing when it is there already.
prepare_root() {
	mkdir -p "$cache/tmp" "$cache/bin"
	[ -d "$root" ] && return
	[ "$(id -u)" = 0 ] || die "must be root to build the Debian root $root; try: sudo $0"
	exec 9>"$cache/lock"
	flock -n 9 || { say "waiting for another run that builds the Debian root"; flock 9; }
	if [ ! -d "$root" ]; then
		need_package debootstrap debootstrap
		build_root
	fi
	exec 9>&-
}

build_root() {
	local new=$root.new log=$cache/debootstrap.log start=$SECONDS
	say "building a Debian $suite root from $mirror into $root"
	say "  with ${packages//,/ }"
	say "  (once; a minute or two; log: $log)"
	rm -rf --one-file-system "$new"
	# Namespaces of its own: nothing that debootstrap mounts or starts outlives it.
	if ! { unshare --mount --pid --fork --kill-child=SIGKILL --mount-proc \
		debootstrap --variant=minbase --include="$packages" "$suite" "$new" "$mirror" &&
		add_beside "$new"; } >"$log" 2>&1 9>&-; then
		tail -n 20 "$log" >&2
		rm -rf --one-file-system "$new"
		die "cannot build the Debian root; the whole log is $log. CRIUHOOK_MIRROR names another mirror"
	fi
	# Not needed to run anything; each sandbox copies all but /usr.
	(cd "$new" && rm -rf var/cache/apt var/cache/debconf var/lib/apt var/lib/dpkg dev usr/share/doc)
	mkdir "$new/dev"
	# Packages of name services have put themselves into it: a test that wants one
	# says so.
	cp "$new/usr/share/libc-bin/nsswitch.conf" "$new/etc/"
	mv "$new" "$root"
	say "built in $((SECONDS - start)) s, $(du -sm "$root" | cut -f1) MiB"
}

# add_beside ROOT: adds /usr/sbin/unscd, of the package $beside, by the package
# index that debootstrap has checked.
add_beside() {
	local new=$1 file sum
	read -r file sum < <(awk -v package="$beside" '
		$1 == "Package:" { here = $2 == package }
		here && $1 == "Filename:" { file = $2 }
		here && $1 == "SHA256:" { print file, $2 }
	' "$new"/var/lib/apt/lists/*_main_binary-*_Packages) ||
		{ say "no package $beside in $suite"; return 1; }
	wget --no-verbose -O "$new/tmp/beside.deb" "$mirror/$file" &&
		echo "$sum  $new/tmp/beside.deb" | sha256sum --check &&
		chroot "$new" dpkg-deb -x /tmp/beside.deb /tmp/beside &&
		mv "$new/tmp/beside/usr/sbin/nscd" "$new/usr/sbin/unscd" &&
		rm -rf "$new/tmp/beside" "$new/tmp/beside.deb"
}
